// Draws /openapi.json: contents, operations with a form to try them, schemas, problems. Text only, never HTML.
"use strict";

const KEY = "forge-docs-key";

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") node.addEventListener("click", value);
    else if (value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== undefined && child !== null));
  return node;
}

// `code` and line breaks are all the markup that descriptions use.
function prose(text) {
  const parts = (text || "").replaceAll("``", "`").split("`");
  return make("p", {}, ...parts.map((part, nth) => (nth % 2 ? make("code", {}, part) : part)));
}

function typeName(schema) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").pop();
  const either = schema.anyOf || schema.oneOf;
  if (either) return either.map(typeName).join(" | ");
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  if (schema.type === "array") return `${typeName(schema.items)}[]`;
  const type = Array.isArray(schema.type) ? schema.type.join(" | ") : schema.type || "any";
  return schema.format ? `${type} (${schema.format})` : type;
}

function bounds(schema) {
  const said = [];
  for (const one of [schema, ...(schema?.anyOf || []), ...(schema?.oneOf || [])]) {
    if (!one) continue;
    if (one.minimum !== undefined) said.push(`from ${one.minimum}`);
    if (one.maximum !== undefined) said.push(`to ${one.maximum}`);
    if (one.maxLength !== undefined) said.push(`at most ${one.maxLength} characters`);
    if (one.maxItems !== undefined) said.push(`at most ${one.maxItems}`);
    if (one.default !== undefined && one.default !== null) said.push(`default ${JSON.stringify(one.default)}`);
  }
  return said.join(", ");
}

function typeCell(schema) {
  const inner = schema?.items || schema;
  const ref = inner?.$ref || (inner?.anyOf || inner?.oneOf || []).find((one) => one.$ref)?.$ref;
  const name = make("code", {}, typeName(schema));
  return make("td", {}, ref ? make("a", { href: `#schema-${ref.split("/").pop()}` }, name) : name);
}

function rows(heads, lines) {
  if (!lines.length) return null;
  const head = make("tr", {}, ...heads.map((text) => make("th", {}, text)));
  return make("table", {}, make("thead", {}, head), make("tbody", {}, ...lines));
}

function parameterRows(parameters) {
  return rows(["Parameter", "Type", ""], parameters.map((given) => make("tr", {},
    make("td", {}, make("code", {}, given.name), given.required ? " required" : "",
      make("div", { class: "faint" }, given.in)),
    typeCell(given.schema),
    make("td", {}, given.description || "", make("div", { class: "faint" }, bounds(given.schema))))));
}

function responseRows(responses) {
  return rows(["Answer", "Body", ""], Object.entries(responses).map(([status, answer]) => {
    const [media, content] = Object.entries(answer.content || {})[0] || ["", {}];
    return make("tr", {}, make("td", {}, make("code", {}, status)),
      content.schema ? typeCell(content.schema) : make("td", {}, media),
      make("td", {}, answer.description || ""));
  }));
}

function example(schema, all, depth = 0) {
  if (!schema || depth > 4) return null;
  if (schema.$ref) return example(all[schema.$ref.split("/").pop()], all, depth + 1);
  if (schema.examples?.length) return schema.examples[0];
  if (schema.type === "array") return [example(schema.items, all, depth + 1)];
  if (schema.type === "integer") return schema.minimum ?? 0;
  if (schema.type === "string") return "";
  const named = (schema.required || []).map((name) => [name, example(schema.properties?.[name], all, depth + 1)]);
  return Object.fromEntries(named);
}

function trial(method, path, operation, parameters, all) {
  const fields = parameters.map((given) => [given, make("input", { "aria-label": given.name, placeholder: given.name })]);
  const body = operation.requestBody?.content?.["application/json"];
  const text = body && make("textarea", { rows: 6, "aria-label": "Body" });
  if (text) text.value = JSON.stringify(example(body.schema, all), null, 2);
  const answer = make("pre", { hidden: true });
  async function send() {
    let target = path;
    const query = new URLSearchParams();
    const headers = {};
    const key = document.getElementById("key").value;
    if (key) headers.Authorization = `Bearer ${key}`;
    for (const [given, input] of fields) {
      if (given.in === "path") target = target.replace(`{${given.name}}`, encodeURIComponent(input.value));
      else if (input.value && given.in === "query") query.append(given.name, input.value);
      else if (input.value) headers[given.name] = input.value;
    }
    if (text) headers["Content-Type"] = "application/json";
    answer.hidden = false;
    try {
      const url = query.size ? `${target}?${query}` : target;
      const reply = await fetch(url, { method: method.toUpperCase(), headers, body: text?.value });
      const type = reply.headers.get("content-type") || "";
      let shown = type.startsWith("image/") ? `(${type})` : await reply.text();
      if (type.includes("json")) shown = JSON.stringify(JSON.parse(shown), null, 2);
      answer.textContent = `${reply.status} ${reply.statusText}\n${shown}`;
    } catch (error) {
      answer.textContent = String(error);
    }
  }
  return make("details", {}, make("summary", {}, "Try it"), ...fields.map(([, input]) => input), text,
    make("button", { type: "button", onclick: send }, "Send"), answer);
}

function operationSection(path, method, operation, shared, all) {
  const parameters = (operation.parameters || []).map((given) => (given.$ref ? shared[given.$ref.split("/").pop()] : given));
  const socket = Boolean(operation.responses["101"]);
  return make("section", { id: operation.operationId },
    make("h3", {}, make("span", { class: `method ${socket ? "ws" : method}` }, socket ? "WS" : method.toUpperCase()),
      make("code", {}, path)),
    prose(operation.description || operation.summary), parameterRows(parameters),
    operation.requestBody && make("p", {}, "Body: ",
      make("a", { href: `#schema-${typeName(operation.requestBody.content["application/json"].schema)}` },
        typeName(operation.requestBody.content["application/json"].schema))),
    responseRows(operation.responses), socket ? null : trial(method, path, operation, parameters, all));
}

function schemaSection(name, schema) {
  const required = new Set(schema.required || []);
  return make("section", { id: `schema-${name}` }, make("h3", {}, make("code", {}, name)), prose(schema.description),
    rows(["Field", "Type", ""], Object.entries(schema.properties || {}).map(([field, inner]) => make("tr", {},
      make("td", {}, make("code", {}, field), required.has(field) ? "" : make("span", { class: "faint" }, " optional")),
      typeCell(inner),
      make("td", {}, inner.description || "", make("div", { class: "faint" }, bounds(inner)))))));
}

function problemSections(problems) {
  return Object.entries(problems).map(([code, told]) => make("section", { id: code },
    make("h3", {}, make("code", {}, code), make("span", { class: "faint" }, `${told.status} ${told.title}`)),
    prose(told.detail)));
}

function draw(found) {
  const contents = document.getElementById("contents");
  const page = document.getElementById("description");
  const all = found.components?.schemas || {};
  const key = make("input", { id: "key", type: "password", autocomplete: "off", placeholder: "key for trying things" });
  key.value = sessionStorage.getItem(KEY) || "";
  key.addEventListener("input", () => sessionStorage.setItem(KEY, key.value));
  contents.append(make("a", { href: "/" }, "forge"), key);
  page.replaceChildren(make("h1", {}, `${found.info.title} ${found.info.version}`), prose(found.info.description));
  const groups = new Map();
  for (const [path, operations] of Object.entries(found.paths)) {
    for (const [method, operation] of Object.entries(operations)) {
      const tag = operation.tags?.[0] || "other";
      groups.set(tag, [...(groups.get(tag) || []), [path, method, operation]]);
    }
  }
  for (const [tag, operations] of groups) {
    contents.append(make("h2", {}, tag));
    page.append(make("h2", {}, tag));
    for (const [path, method, operation] of operations) {
      contents.append(make("a", { href: `#${operation.operationId}` },
        `${method.toUpperCase()} ${path.replace("/api/v1/comfyui", "")}`));
      page.append(operationSection(path, method, operation, found.components.parameters || {}, all));
    }
  }
  contents.append(make("h2", {}, "more"), make("a", { href: "#schemas" }, "schemas"),
    make("a", { href: "#problems" }, "problems"), make("a", { href: "/openapi.json" }, "openapi.json"));
  page.append(make("h2", { id: "schemas" }, "schemas"), ...Object.entries(all).map(([name, one]) => schemaSection(name, one)));
  page.append(make("h2", { id: "problems" }, "problems"), ...problemSections(found["x-forge-problems"] || {}));
  document.getElementById(decodeURIComponent(location.hash.slice(1)))?.scrollIntoView();
}

fetch("/openapi.json").then((reply) => reply.json()).then(draw, (error) => {
  document.getElementById("description").textContent = `The document cannot be read: ${error}`;
});
