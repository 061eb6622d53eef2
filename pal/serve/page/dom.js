// Small helpers for elements and numbers in words.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children; strings become text, never markup. */
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** Show an error beside what caused it; null takes it away. `field` is marked for screen readers. */
export function fault(id, message, field = null) {
  const place = byId(id);
  place.textContent = message ?? "";
  place.hidden = message === null;
  if (field === null) return;
  if (message === null) field.removeAttribute("aria-invalid");
  else field.setAttribute("aria-invalid", "true");
}

export function inMilliseconds(ms) {
  return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(2)} s`;
}

export function inBytes(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(bytes < 1e4 ? 1 : 0)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export function inParameters(count) {
  return count < 1e6 ? `${Math.round(count / 1e3)} thousand` : `${(count / 1e6).toFixed(count < 1e7 ? 1 : 0)} million`;
}
