// Sets the theme before the first paint. Not a module, because modules run after the page is parsed.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    let choice = "auto";
    try {
      choice = JSON.parse(localStorage.getItem("qwench.theme")) ?? "auto";
    } catch {
      // no storage, or not ours: auto
    }
    document.documentElement.dataset.theme = choice === "auto" ? (dark.matches ? "dark" : "light") : choice;
  };
  apply();
  dark.addEventListener("change", apply);
  window.addEventListener("qwench-theme", apply);
})();
