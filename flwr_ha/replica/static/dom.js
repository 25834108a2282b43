// Small tools to build elements; text is always set as text, never as markup.

export const byId = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

/** Change a text only where it differs, so that screen readers do not read it again. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function setClass(element, base, extra) {
  const wanted = extra ? `${base} ${extra}` : base;
  if (element.className !== wanted) element.className = wanted;
}

export const clock = (at) => new Date(at).toLocaleTimeString([], { hour12: false });

export function ago(at, now = Date.now()) {
  const seconds = Math.max(0, Math.round((now - Date.parse(at)) / 1000));
  if (seconds < 90) return `${seconds} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return seconds < 129600 ? `${Math.round(seconds / 3600)} h ago` : `${Math.round(seconds / 86400)} days ago`;
}

export function size(bytes) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  const power = bytes > 0 ? Math.min(Math.floor(Math.log10(bytes) / 3), units.length - 1) : 0;
  return `${(bytes / 1000 ** power).toPrecision(3)} ${units[power]}`;
}

export function number(value) {
  const size = Math.abs(value);
  if (value === 0 || (size >= 0.001 && size < 100000)) return String(Number(value.toPrecision(4)));
  return value.toExponential(2);
}
