"use strict";
// The browser of pairs. Text of chats is shown with textContent only, never as HTML.
(() => {
  const PAGE = 10; // records that are added at a time
  const MOST_CELLS = 4e6; // of a comparison of two texts; longer ones are shown as replaced
  const root = document.documentElement;
  const $ = (id) => document.getElementById(id);

  const theme = $("theme");
  theme.hidden = false;
  theme.addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    remember();
  });

  const FIELDS = ["search", "reason", "split", "low", "high", "order", "diff"];
  const source = $("data");
  const data = source ? JSON.parse(source.textContent) : null;
  const haystacks = new Map(); // record -> all its text in lower case, made when it is first searched
  let found = [];
  let shown = 0;

  // State lies in the address, so that it survives the page loading itself again, and can be sent to others.
  function remember() {
    const state = new URLSearchParams();
    if (root.dataset.theme) state.set("theme", root.dataset.theme);
    if (data) for (const name of FIELDS) if ($(name).value) state.set(name, $(name).value);
    history.replaceState(null, "", `${state}` ? `#?${state}` : location.pathname);
  }

  function recall() {
    if (!location.hash.startsWith("#?")) return;
    const state = new URLSearchParams(location.hash.slice(2));
    const wanted = state.get("theme");
    if (wanted === "light" || wanted === "dark") root.dataset.theme = wanted;
    if (data) for (const name of FIELDS) $(name).value = state.get(name) ?? "";
  }

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  // --- which records ---

  function haystack(record) {
    let text = haystacks.get(record);
    if (text === undefined) {
      const parts = [record.id, record.complaint, ...record.prompt.map((turn) => turn[1])];
      for (const stage of record.stages) parts.push(...stage.drops.map((drop) => drop[1]));
      parts.push(...record.texts);
      text = parts.filter(Boolean).join("\n").toLowerCase();
      haystacks.set(record, text);
    }
    return text;
  }

  const margins = (record) => record.stages.map((stage) => stage.margin).filter((margin) => margin !== null);

  function filter() {
    const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const reason = $("reason").value;
    const split = $("split").value;
    const low = $("low").value === "" ? -Infinity : Number($("low").value);
    const high = $("high").value === "" ? Infinity : Number($("high").value);
    const bounded = low > -Infinity || high < Infinity;
    found = data.records.filter((record) => {
      const drops = record.stages.flatMap((stage) => stage.drops.map((drop) => drop[1]));
      if (reason === "none" && drops.length) return false;
      if (reason === "any" && !drops.length) return false;
      if (reason.startsWith("reason:") && !drops.includes(reason.slice(7))) return false;
      if (split && !record.stages.some((stage) => stage.split === split)) return false;
      if (bounded && !margins(record).some((margin) => margin >= low && margin <= high)) return false;
      return words.every((word) => haystack(record).includes(word));
    });
    const order = $("order").value;
    if (order) {
      // Of several stages the last margin counts; records without one come last.
      const sign = order === "up" ? 1 : -1;
      const key = (record) => margins(record).at(-1);
      found.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (x - y);
      });
    }
    $("list").replaceChildren();
    shown = 0;
    more();
    remember();
  }

  function more() {
    const next = found.slice(shown, shown + PAGE);
    $("list").append(...next.map(card));
    shown += next.length;
    $("count").textContent = `${found.length} of ${data.records.length} records, ${shown} shown`;
    $("more").hidden = shown >= found.length;
  }

  // --- one record ---

  function card(record) {
    const made = element("article", "record");
    made.append(element("p", "id", record.id));
    const turns = element("div", "long");
    for (const [role, text] of record.prompt) turns.append(turn(role, text, "turn text"));
    made.append(turns);
    if (record.complaint !== null) made.append(turn("complaint", record.complaint, "turn text complaint"));
    const replies = element("div", "replies");
    const pairs = record.stages.filter((stage) => stage.chosen !== null);
    // A logged side is the same in every stage, and is shown once.
    const say = (place) => (place === null ? null : record.texts[place]);
    const same = pairs.length && pairs.every((stage) => stage.rejected === pairs[0].rejected);
    if (same) replies.append(reply("rejected", "rejected", "", say(pairs[0].rejected), null));
    const mode = $("diff").value;
    let before = null; // the chosen reply of the iteration before, of the same run
    let group = null;
    for (const stage of record.stages) {
      const name = data.columns[stage.column].name;
      if (data.columns[stage.column].group !== group) before = null;
      group = data.columns[stage.column].group;
      const note = [stage.split === "test" ? "held out" : "train"];
      if (stage.margin !== null) note.push(`margin ${stage.margin.toFixed(3)}`);
      if (stage.chosen !== null) {
        if (!same) replies.append(reply("rejected", `${name} rejected`, "", say(stage.rejected), null));
        const base = mode === "rejected" ? say(stage.rejected) : mode === "previous" ? before : null;
        replies.append(reply("chosen", `${name} chosen`, note.join(", "), say(stage.chosen), base));
        before = group === null ? null : say(stage.chosen);
      }
      // A record that is left out has no text of its own, and its completions say why.
      const drops = stage.drops.filter(([text]) => text !== null || stage.drops.length === 1);
      for (const [text, reason] of drops) replies.append(reply("dropped", `${name} dropped`, reason, say(text) ?? "", null));
    }
    made.append(replies);
    return made;
  }

  function turn(role, text, className) {
    const made = element("div", className);
    made.append(element("span", "role", role), text);
    return made;
  }

  function reply(kind, name, note, text, base) {
    const made = element("div", `reply ${kind}`);
    made.append(element("h4", "", note ? `${name} (${note})` : name));
    const body = element("div", "text long");
    if (base === null) body.textContent = text;
    else body.append(...differences(base, text));
    made.append(body);
    return made;
  }

  // --- words that differ: the longest common subsequence ---

  // The space after a word belongs to it: spaces of their own would be found equal among words that are not.
  const words = (text) => text.match(/(?:\p{Script=Han}|[\p{L}\p{N}\p{M}_]+(?:['’][\p{L}\p{N}]+)*|[^\s])\s*|\s+/gu) ?? [];
  const equal = (x, y) => x === y || (x.trimEnd() === y.trimEnd() && x.trimEnd() !== "");

  function differences(before, after) {
    const a = words(before);
    const b = words(after);
    let start = 0;
    while (start < a.length && start < b.length && equal(a[start], b[start])) start++;
    let end = 0;
    while (end < a.length - start && end < b.length - start && equal(a.at(-1 - end), b.at(-1 - end))) end++;
    const parts = [];
    const add = (tag, word) => {
      const last = parts.at(-1);
      if (last && last[0] === tag) last[1].push(word);
      else parts.push([tag, [word]]);
    };
    for (const word of b.slice(0, start)) add("span", word);
    middle(a.slice(start, a.length - end), b.slice(start, b.length - end), add);
    for (const word of b.slice(b.length - end)) add("span", word);
    return parts.map(([tag, list]) => element(tag, "", list.join("")));
  }

  function middle(a, b, add) {
    const width = b.length + 1;
    if (a.length * b.length <= MOST_CELLS) {
      const best = new Uint16Array((a.length + 1) * width); // of what follows (i, j); texts have under 65,536 words
      for (let i = a.length - 1; i >= 0; i--)
        for (let j = b.length - 1; j >= 0; j--)
          best[i * width + j] =
            equal(a[i], b[j])
              ? best[(i + 1) * width + j + 1] + 1
              : Math.max(best[(i + 1) * width + j], best[i * width + j + 1]);
      let i = 0;
      let j = 0;
      while (i < a.length && j < b.length) {
        if (equal(a[i], b[j])) {
          add("span", b[j++]);
          i++;
        } else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) add("del", a[i++]);
        else add("ins", b[j++]);
      }
      a = a.slice(i);
      b = b.slice(j);
    }
    for (const word of a) add("del", word);
    for (const word of b) add("ins", word);
  }

  recall();
  if (data) {
    $("filters").hidden = false;
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    $("filters").addEventListener("input", filter);
    $("more").addEventListener("click", more);
    const goal = location.hash;
    filter();
    if (goal.startsWith("#") && !goal.startsWith("#?")) history.replaceState(null, "", goal);
  }
  const refresh = Number(document.body.dataset.refresh);
  if (refresh) setTimeout(() => location.reload(), 1000 * refresh);
})();
