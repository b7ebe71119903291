// A page about the API, of what the server says of itself in openapi.json.

import { url } from "./api.js";
import { $, element, tell } from "./dom.js";

const EXAMPLE = {
  prompt: "a hall of stone",
  actions: "w-48,dw-24",
  candidates: '["w-48", "dw-48"]',
  input_reference: "@hall.png",
};

async function begin() {
  const api = await (await fetch(url("openapi.json"))).json();
  $("#model").textContent = `The API, version ${api.info.version}`;
  const found = Object.entries(api.paths).flatMap(([path, verbs]) =>
    Object.entries(verbs).map(([verb, about]) => request(path, verb, about, api)),
  );
  $("#requests").append(...found);
}

function request(path, verb, about, api) {
  const section = element("section", { id: about.operationId });
  const name = element("span", { className: "verb", textContent: verb.toUpperCase() });
  section.append(element("h2", {}, name, element("code", { textContent: path })));
  if (about.description) section.append(element("p", { textContent: about.description }));
  const parameters = (about.parameters ?? []).map((each) => [
    each.name,
    [words(each.schema, api), each.required && each.in !== "path" && "required", `in the ${each.in}`],
  ]);
  const bodies = about.requestBody?.content ?? {};
  const form = resolved((bodies["multipart/form-data"] ?? Object.values(bodies)[0])?.schema, api);
  const fields = Object.entries(form?.properties ?? {}).map(([field, schema]) => [
    field,
    [words(schema, api), form.required?.includes(field) && "required", schema.description],
  ]);
  if (parameters.length) section.append(table(parameters));
  if (fields.length) section.append(hint(`The body: ${Object.keys(bodies).join(" or ")}`), table(fields));
  const answer = about.responses?.["200"]?.content?.["application/json"]?.schema;
  const shape = resolved(answer, api);
  if (shape?.properties) section.append(answered(shape, api));
  section.append(element("pre", { textContent: example(path, verb, form) }));
  return section;
}

function answered(shape, api) {
  const row = ([field, schema]) => [field, [words(schema, api), schema.description]];
  const rows = Object.entries(shape.properties).map(row);
  const details = element("details", {}, element("summary", { textContent: `Answers ${shape.title}` }));
  if (shape.description) details.append(hint(shape.description));
  details.append(table(rows));
  return details;
}

const hint = (textContent) => element("p", { className: "hint", textContent });

function table(rows) {
  const cells = rows.flatMap(([name, about]) => [
    element("dt", {}, element("code", { textContent: name })),
    element("dd", { textContent: about.filter(Boolean).join("; ") }),
  ]);
  return element("dl", {}, ...cells);
}

function resolved(schema, api) {
  return schema?.$ref ? api.components.schemas[schema.$ref.split("/").at(-1)] : schema;
}

/** What a value is, in few words. */
function words(schema, api) {
  if (!schema) return "";
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.anyOf) return schema.anyOf.map((each) => words(each, api)).filter((each) => each !== "null").join(" or ");
  if (schema.enum) return schema.enum.join(", ");
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.format === "binary") return "file";
  const low = schema.minimum ?? schema.exclusiveMinimum;
  const limits = schema.maximum !== undefined && low !== undefined ? ` from ${low} to ${schema.maximum}` : "";
  const normally = schema.default || schema.default === 0 ? `, ${JSON.stringify(schema.default)} by default` : "";
  if (schema.type === "array") return `list of ${words(schema.items, api)}`;
  return `${schema.type ?? "anything"}${limits}${normally}`;
}

function example(path, verb, form) {
  const options = verb === "get" ? "" : `-X ${verb.toUpperCase()} `;
  if (!form) return `curl ${options}${url(path.slice(1)).replaceAll("%7B", "{").replaceAll("%7D", "}")}`;
  const fields = Object.entries(EXAMPLE).filter(([name]) => name in (form.properties ?? {}));
  return `curl ${url(path.slice(1))}${fields.map(([name, value]) => ` \\\n  -F '${name}=${value}'`).join("")}`;
}

begin().catch((error) => tell(`openapi.json cannot be read: ${error.message}`, true));
