// Dark or light, before the first paint: a classic script in the head, so that the page never flashes.
// Without a choice the page follows the system.

const THEME_KEY = "diffusiongemma.theme";

function systemTheme() {
  return matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
}

function chosenTheme() {
  const stored = localStorage.getItem(THEME_KEY);
  return stored === "dark" || stored === "light" ? stored : null;
}

/** Show a theme and remember it; the system's own is remembered as "no choice", so that it goes on being followed. */
function chooseTheme(theme) {
  if (theme === systemTheme()) localStorage.removeItem(THEME_KEY);
  else localStorage.setItem(THEME_KEY, theme);
  applyTheme();
}

function applyTheme() {
  const chosen = chosenTheme();
  if (chosen) document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
  document.dispatchEvent(new CustomEvent("themechange", { detail: chosen ?? systemTheme() }));
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
applyTheme();

globalThis.theme = { choose: chooseTheme, current: () => chosenTheme() ?? systemTheme() };
