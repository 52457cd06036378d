/** The page's words in English and Chinese. `t("key", {name: value})` fills in `{name}`; `translate` fills the HTML. */

const EN = {
  "app.title": "qwench chat", skip: "Skip to the message box", "side.label": "Conversations", "side.toggle": "Show or hide conversations", new: "New chat",
  search: "Search conversations", "search.none": "Nothing found", "list.empty": "Conversations appear here and stay in this browser.",
  today: "Today", yesterday: "Yesterday", week: "Last 7 days", earlier: "Earlier", rename: "Rename", delete: "Delete", deleted: "Deleted “{title}”", undo: "Undo",
  export: "Export", "export.one": "Export this conversation", import: "Import", imported: "{n} conversations imported", "import.bad": "This file has no conversations: {why}",
  untitled: "New chat", model: "Model", "model.none": "no model", settings: "Settings", close: "Close", messages: "Messages", input: "Message",
  placeholder: "Ask anything", hint: "Enter sends · Shift + Enter starts a new line", send: "Send", stop: "Stop", latest: "Jump to the latest",
  "empty.title": "What can I help with?", "empty.sub": "The model runs on this server. Conversations stay in this browser.",
  "try.1": "Explain how attention works, with a small example", "try.2": "Write a Python function that parses a CSV line, with tests",
  "try.3": "Compare BPE and unigram tokenizers in a table", "try.4": "Prove that the square root of 2 is irrational",
  you: "You", assistant: "Answer", copy: "Copy", "copy.code": "Copy code", copied: "Copied", code: "text", edit: "Edit", regenerate: "Regenerate", cancel: "Cancel", save: "Send",
  "edit.label": "Edit message", "version.prev": "Previous version", "version.next": "Next version", "version.of": "Version {i} of {n}",
  "task.done": "done", "task.open": "open", writing: "Writing", "live.started": "The answer is being written", "live.done": "The answer is complete", "live.stopped": "Stopped",
  "live.error": "Error: {what}", "stat.speed": "{n} tokens/s", "stat.first": "first token {s} s", "stat.out": "{n} tokens", "stat.prompt": "prompt {n}", "stat.cached": "{n} cached",
  "stat.time": "{s} s", stopped: "Stopped", "cut.length": "Cut off at the token limit", retry: "Retry",
  "err.network": "The server cannot be reached", "err.network.help": "Check that it is running. This page looks for it again by itself.", "err.back": "The server is back.",
  "err.auth": "The server wants an API key", "err.auth.help": "Enter it in the settings; it stays in this browser.", "err.auth.do": "Enter the key",
  "err.busy": "The server is busy", "err.busy.help": "Too many requests at once. Try again in a moment.", "err.busy.after": "Try again in {s} s.",
  "err.context": "The conversation is too long for the model", "err.context.help": "Edit an earlier message, lower the maximum of tokens, or start a new chat.",
  "err.bad": "The server refused the request", "err.server": "The server failed", "err.broken": "The connection broke off", "err.broken.help": "What had arrived is kept.",
  "err.closed": "The page was closed while the answer was being written", "err.settings": "A setting is not valid", "err.settings.do": "Open the settings",
  "set.system": "System prompt", "set.system.hint": "How the model should behave in this conversation", "set.sampling": "Sampling", "set.default": "default",
  "set.sampling.note": "Empty fields take the model's own defaults.", "set.reset": "Reset to defaults", "set.output": "Answer format", "set.tools": "Tools", "set.page": "This page",
  "p.temperature": "Temperature", "p.temperature.hint": "0 always takes the likeliest token", "p.top_p": "Top p", "p.top_p.hint": "Keep the likeliest tokens up to this share",
  "p.top_k": "Top k", "p.top_k.hint": "Keep this many tokens; 0 keeps all", "p.min_p": "Min p", "p.min_p.hint": "Drop tokens below this share of the likeliest",
  "p.repetition_penalty": "Repetition penalty", "p.repetition_penalty.hint": "Above 1 makes repeating less likely", "p.presence_penalty": "Presence penalty",
  "p.presence_penalty.hint": "Against any token that has appeared", "p.frequency_penalty": "Frequency penalty", "p.frequency_penalty.hint": "Grows with each repetition",
  "p.max_tokens": "Max tokens", "p.max_tokens.hint": "Longest answer", "p.seed": "Seed", "p.seed.hint": "The same seed repeats the same answer", "p.stop": "Stop strings", "p.stop.hint": "One a line; the answer ends before them",
  "f.text": "Text", "f.json_object": "Any JSON object", "f.json_schema": "JSON that follows a schema", "f.schema": "JSON schema", "f.example": "Insert an example",
  "tools.hint": "OpenAI's tool definitions as JSON. When the model calls one, its card asks you for the result.", "tools.label": "Tool definitions", "tools.choice": "Use of tools", "tools.auto": "The model decides",
  "tools.none": "Never", "tools.required": "Always", "tools.count": "tools: {n}", "tool.call": "Tool call", "tool.args": "Arguments", "tool.result": "Result", "tool.enter": "Type what the tool returns",
  "tool.send": "Send results", "tool.waiting": "Give the tool's result first, or edit an earlier message.", "bad.json": "Not valid JSON: {why}", "bad.tools": "Expected a list of tools, each with a function's name",
  "bad.schema": "Expected a JSON object", "bad.number": "{name}: give a number from {min} to {max}", "page.theme": "Theme", "theme.auto": "Auto", "theme.light": "Light", "theme.dark": "Dark", "page.language": "Language",
  "page.key": "API key", "page.key.hint": "Sent only to this server. Forgotten when the tab closes", "page.key.keep": "Keep on this device", "store.memory": "This browser does not store data for this page: conversations are lost on reload. Export what you want to keep.",
  "store.full": "The conversation could not be stored: {why}", "chip.system": "system prompt", "chip.json": "JSON", "chip.sampling": "{n} sampling settings", "delete.all": "Delete all conversations", "delete.sure": "Press again to delete all {n}",
};

const ZH = {
  "app.title": "qwench 对话", skip: "跳到输入框", "side.label": "对话列表", "side.toggle": "显示或隐藏对话列表", new: "新对话",
  search: "搜索对话", "search.none": "没有找到", "list.empty": "对话会出现在这里，只保存在本浏览器中。",
  today: "今天", yesterday: "昨天", week: "最近 7 天", earlier: "更早", rename: "重命名", delete: "删除", deleted: "已删除“{title}”", undo: "撤销",
  export: "导出", "export.one": "导出此对话", import: "导入", imported: "已导入 {n} 个对话", "import.bad": "文件中没有对话：{why}",
  untitled: "新对话", model: "模型", "model.none": "没有模型", settings: "设置", close: "关闭", messages: "消息", input: "消息",
  placeholder: "有什么想问的", hint: "Enter 发送 · Shift + Enter 换行", send: "发送", stop: "停止", latest: "跳到最新",
  "empty.title": "有什么可以帮你？", "empty.sub": "模型运行在这台服务器上，对话只保存在本浏览器中。",
  "try.1": "用一个小例子解释注意力机制", "try.2": "写一个解析 CSV 行的 Python 函数，并附测试",
  "try.3": "用表格比较 BPE 和 unigram 分词", "try.4": "证明根号 2 是无理数",
  you: "你", assistant: "回答", copy: "复制", "copy.code": "复制代码", copied: "已复制", code: "文本", edit: "编辑", regenerate: "重新生成", cancel: "取消", save: "发送",
  "edit.label": "编辑消息", "version.prev": "上一个版本", "version.next": "下一个版本", "version.of": "第 {i} 个版本，共 {n} 个",
  "task.done": "已完成", "task.open": "未完成", writing: "正在回答", "live.started": "正在回答", "live.done": "回答完毕", "live.stopped": "已停止",
  "live.error": "错误：{what}", "stat.speed": "{n} 词元/秒", "stat.first": "首词元 {s} 秒", "stat.out": "{n} 词元", "stat.prompt": "提示 {n}", "stat.cached": "缓存 {n}",
  "stat.time": "{s} 秒", stopped: "已停止", "cut.length": "达到词元上限，回答被截断", retry: "重试",
  "err.network": "无法连接服务器", "err.network.help": "请确认服务器正在运行。本页会自动重新连接。", "err.back": "服务器已恢复。",
  "err.auth": "服务器需要 API 密钥", "err.auth.help": "请在设置中填写，只保存在本浏览器中。", "err.auth.do": "填写密钥",
  "err.busy": "服务器繁忙", "err.busy.help": "请求过多，请稍后重试。", "err.busy.after": "请在 {s} 秒后重试。",
  "err.context": "对话超出了模型的上下文长度", "err.context.help": "请编辑之前的消息、调低最大词元数，或新建对话。",
  "err.bad": "服务器拒绝了请求", "err.server": "服务器出错", "err.broken": "连接中断", "err.broken.help": "已收到的内容已保留。",
  "err.closed": "回答过程中页面被关闭", "err.settings": "有设置项无效", "err.settings.do": "打开设置",
  "set.system": "系统提示词", "set.system.hint": "模型在此对话中应当如何表现", "set.sampling": "采样", "set.default": "默认",
  "set.sampling.note": "留空则使用模型自带的默认值。", "set.reset": "恢复默认", "set.output": "回答格式", "set.tools": "工具", "set.page": "本页面",
  "p.temperature": "温度", "p.temperature.hint": "0 表示总取最可能的词元", "p.top_p": "Top p", "p.top_p.hint": "保留累计概率达到此值的词元",
  "p.top_k": "Top k", "p.top_k.hint": "保留的词元数，0 为不限", "p.min_p": "Min p", "p.min_p.hint": "去掉低于最大概率此比例的词元",
  "p.repetition_penalty": "重复惩罚", "p.repetition_penalty.hint": "大于 1 时减少重复", "p.presence_penalty": "存在惩罚",
  "p.presence_penalty.hint": "惩罚出现过的词元", "p.frequency_penalty": "频率惩罚", "p.frequency_penalty.hint": "随重复次数增大",
  "p.max_tokens": "最大词元数", "p.max_tokens.hint": "回答的最大长度", "p.seed": "随机种子", "p.seed.hint": "相同种子得到相同回答", "p.stop": "停止字符串", "p.stop.hint": "每行一个，遇到即停止",
  "f.text": "文本", "f.json_object": "任意 JSON 对象", "f.json_schema": "符合模式的 JSON", "f.schema": "JSON 模式", "f.example": "插入示例",
  "tools.hint": "OpenAI 格式的工具定义（JSON）。模型调用工具时，会显示卡片请你填写结果。", "tools.label": "工具定义", "tools.choice": "工具使用", "tools.auto": "由模型决定",
  "tools.none": "不使用", "tools.required": "必须使用", "tools.count": "工具：{n}", "tool.call": "工具调用", "tool.args": "参数", "tool.result": "结果", "tool.enter": "填写工具返回的内容",
  "tool.send": "提交结果", "tool.waiting": "请先填写工具的结果，或编辑之前的消息。", "bad.json": "不是有效的 JSON：{why}", "bad.tools": "应为工具列表，每个工具要有函数名",
  "bad.schema": "应为 JSON 对象", "bad.number": "{name}：请填 {min} 到 {max} 之间的数", "page.theme": "主题", "theme.auto": "自动", "theme.light": "浅色", "theme.dark": "深色", "page.language": "语言",
  "page.key": "API 密钥", "page.key.hint": "只发送给本服务器，关闭标签页后忘记", "page.key.keep": "在此设备上保留", "store.memory": "浏览器不为本页保存数据，刷新后对话会丢失。请导出需要保留的内容。",
  "store.full": "对话无法保存：{why}", "chip.system": "系统提示词", "chip.json": "JSON", "chip.sampling": "{n} 项采样设置", "delete.all": "删除所有对话", "delete.sure": "再按一次，删除全部 {n} 个",
};

const TABLES = { en: EN, zh: ZH };
let current = "en";

/** @param {"auto" | "en" | "zh"} choice */
export function setLanguage(choice) {
  const wanted = choice === "auto" ? navigator.language : choice;
  current = wanted.toLowerCase().startsWith("zh") ? "zh" : "en";
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
}

export const language = () => current;

/** @param {string} key @param {Record<string, string | number>} values */
export function t(key, values = {}) {
  const text = TABLES[current][key] ?? EN[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (all, name) => (name in values ? String(values[name]) : all));
}

/** Fills elements with `data-t` (text), `data-t-label` (name and tooltip) and `data-t-placeholder` below `root`. */
export function translate(root) {
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-placeholder]")) element.placeholder = t(element.dataset.tPlaceholder);
  for (const element of root.querySelectorAll("[data-t-label]")) {
    element.setAttribute("aria-label", t(element.dataset.tLabel));
    if (element.tagName === "BUTTON") element.title = t(element.dataset.tLabel);
  }
}

/** A number as people of this language write it. */
export const number = (value, digits = 0) =>
  new Intl.NumberFormat(document.documentElement.lang, { maximumFractionDigits: digits, minimumFractionDigits: digits }).format(value);
