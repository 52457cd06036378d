// llama.cpp beside the engine: node benchmarks/llama_cpp.mjs PACKAGES MODEL.gguf THREADS SEQUENCES CONTEXT
//
// PACKAGES is a node_modules folder with node-llama-cpp, which brings llama.cpp's own binaries for every processor.
// Reads one line a job from standard input, {"prompts": [[ids]], "new_tokens": n}, and answers each with a line
// {"arrivals": [s], "tokens": [[ids]]}: all prompts at the same time, greedy, over the end of the answer. Arrivals are
// those of the first answer's tokens, in seconds from the start.
import readline from "node:readline";
import {pathToFileURL} from "node:url";
import path from "node:path";

const [packages, modelPath, threads, sequences, contextSize] = process.argv.slice(2);
const entry = path.resolve(packages, "node-llama-cpp", "dist", "index.js");
const {getLlama} = await import(pathToFileURL(entry));
const llama = await getLlama({gpu: false, build: "never", maxThreads: +threads, logLevel: "error"});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const context = await model.createContext({
    sequences: +sequences, contextSize: +contextSize, batchSize: 1024, threads: +threads,
});
const slots = Array.from({length: +sequences}, () => context.getSequence());

async function answer(slot, prompt, count, started, seen) {
    const tokens = [];
    for await (const token of slot.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        tokens.push(token);
        seen?.push((performance.now() - started) / 1e3);
        if (tokens.length >= count) break;
    }
    return tokens;
}

console.log(JSON.stringify({ready: true, threads: context.currentThreads, system: llama.systemInfo}));
for await (const line of readline.createInterface({input: process.stdin})) {
    const {prompts, new_tokens: count} = JSON.parse(line);
    for (const slot of slots) await slot.clearHistory();
    const arrivals = [];
    const started = performance.now();
    const tokens = await Promise.all(prompts.map(
        (prompt, i) => answer(slots[i], prompt, count, started, i === 0 ? arrivals : undefined)));
    console.log(JSON.stringify({arrivals, tokens}));
}
process.exit(0);
