// The API's own page, drawn from /openapi.json.
"use strict";

(async () => {
  const schema = await (await fetch("/openapi.json")).json();
  const find = (node) => (node && node.$ref ? schema.components.schemas[node.$ref.split("/").pop()] : node);

  function make(parent, tag, text, name) {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    parent.append(node);
    return node;
  }

  /** A field's type, default and limits in words. */
  function kind(field) {
    const node = find(field);
    if (node.anyOf) return [...new Set(node.anyOf.map(kind))].filter((k) => k && k !== "null").join(" or ");
    const words = node.enum ? node.enum.join(" | ") : node.type === "array" ? `list of ${kind(node.items || {}) || "values"}` : node.title && node.properties ? node.title : node.type || "";
    const least = node.minimum ?? node.exclusiveMinimum, most = node.maximum ?? node.exclusiveMaximum;
    const above = node.exclusiveMinimum != null ? "above " : "", below = node.exclusiveMaximum != null ? "below " : "";
    const range = least != null && most != null ? ` from ${above}${least} to ${below}${most}` : least != null ? ` from ${above}${least}` : "";
    return words + range;
  }

  function fields(parent, node) {
    const list = make(parent, "dl");
    for (const [name, field] of Object.entries(node.properties || {})) {
      const needed = (node.required || []).includes(name);
      make(list, "dt", name);
      const start = field.default === undefined || field.default === null ? "" : `, else ${JSON.stringify(field.default)}`;
      make(list, "dd", [kind(field) + (needed ? ", needed" : start), field.description].filter(Boolean).join(". "));
    }
  }

  const json = (value) => JSON.stringify(value, null, 2);
  const root = document.getElementById("operations");
  for (const [path, methods] of Object.entries(schema.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      const card = make(root, "section", undefined, "card");
      card.id = method + path;
      const link = make(document.getElementById("contents"), "a", path);
      link.href = `#${card.id}`;
      const title = make(card, "h2");
      make(title, "b", method.toUpperCase());
      title.append(path);
      make(card, "p", operation.summary || "", "soft");
      const body = find(operation.requestBody?.content["application/json"].schema);
      const example = body?.examples?.[0];
      make(card, "h3", "Ask");
      const sent = example ? ` \\\n  -H 'content-type: application/json' \\\n  -d '${json(example)}'` : "";
      make(card, "pre", `curl -s ${location.origin}${path}${sent}`);
      for (const [type, content] of Object.entries(operation.responses["200"].content || {})) {
        if (content.example === undefined) continue;
        make(card, "h3", type === "text/event-stream" ? "Answer with stream true: events such as" : "Answer");
        make(card, "pre", type === "text/event-stream" ? `data: ${JSON.stringify(content.example)}` : json(content.example));
      }
      if (!body) continue;
      const more = make(card, "details");
      make(more, "summary", "Fields");
      fields(more, body);
      if (body.properties.length) {
        make(more, "h3", "length");
        fields(more, schema.components.schemas.LengthControl);
      }
      const errors = make(card, "details");
      make(errors, "summary", "Errors");
      const list = make(errors, "dl");
      for (const [status, reply] of Object.entries(operation.responses)) {
        if (status < 400) continue;
        make(list, "dt", status);
        make(list, "dd", reply.description);
      }
    }
  }
})();
