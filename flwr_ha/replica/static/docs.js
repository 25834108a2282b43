// The API for people: the OpenAPI document as a page.

import { byId, make } from "./dom.js";

const TONES = { get: "good", head: "good", post: "warn", patch: "warn" };

function example(method, path, operation) {
  const secret = operation.security ? " -H \"Authorization: Bearer $SECRET\"" : "";
  const verb = { get: "", head: " --head" }[method] ?? ` -X ${method.toUpperCase()}`;
  return `curl${verb}${secret} ${location.origin}${path}`;
}

function section(path, method, operation, shared) {
  const title = make("h3", {}, make("span", { class: `chip ${TONES[method]}` }, method.toUpperCase()), make("code", {}, path));
  const facts = Object.entries(operation.responses).map(([status, response]) =>
    make("tr", {}, make("td", {}, make("code", {}, status)), make("td", {}, response.description)));
  const parameters = [...shared, ...(operation.parameters ?? [])].map((each) =>
    make("tr", {}, make("td", {}, make("code", {}, each.name)), make("td", {}, `${each.in}${each.required ? ", required" : ""}${each.description ? `: ${each.description}` : ""}`)));
  return make("article", { class: "card op" }, title, make("p", {}, operation.summary),
    make("div", { class: "scroll" }, make("table", {}, make("tbody", {}, ...parameters, ...facts))),
    make("pre", { tabindex: "0" }, example(method, path, operation)));
}

const description = await (await fetch("/openapi.json")).json();
byId("title").append(make("span", { class: "muted" }, ` ${description.info.version}`));
byId("about").textContent = description.info.description;
for (const [path, item] of Object.entries(description.paths)) {
  for (const [method, operation] of Object.entries(item)) {
    if (method === "parameters") continue;
    byId("operations").append(section(path, method, operation, item.parameters ?? []));
  }
}
