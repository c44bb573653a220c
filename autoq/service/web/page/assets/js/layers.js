// Where a decision group stands in the model, read from its name.

const FIRST_INDEX = /^(.*?)\.?(?<![^.])(\d+)\.(.+)$/;

/** Stack ("model.layers"), block and type of a group; outside blocks only a type. */
export function layerPosition(name) {
  const match = FIRST_INDEX.exec(name);
  if (match === null) return { stack: null, block: null, type: name };
  return { stack: match[1], block: Number(match[2]), type: match[3] };
}

/** The last part of a type, fused projections joined: self_attn.q_proj+k_proj -> q/k. */
export function shortType(type) {
  const parts = type.slice(type.lastIndexOf(".") + 1).split("+");
  const projections = parts.length > 1 && parts.every((part) => part.endsWith("_proj"));
  return (projections ? parts.map((part) => part.slice(0, -"_proj".length)) : parts).join("/");
}

/** What a type's layers belong to: self_attn. */
export function parentOf(type) {
  const parents = type.split(".").slice(0, -1);
  return parents.at(-1) ?? "";
}

/**
 * Groups by stack, in the order in which stacks, blocks and types first occur.
 * @returns {Array<{title: string, rows: string[], columns: string[], cells: Map<string, number>}>}
 *   `cells`: index of a group, by `cellKey(row, column)`.
 */
export function panels(groups) {
  const found = new Map();
  groups.forEach((group, index) => {
    const { stack, block, type } = layerPosition(group.name);
    const panel = found.get(stack) ?? { title: stack === null ? "outside the blocks" : stack || "blocks", rows: [], columns: [], cells: new Map(), known: [new Set(), new Set()] };
    found.set(stack, panel);
    const row = block === null ? "" : String(block);
    for (const [list, seen, name] of [[panel.rows, panel.known[0], row], [panel.columns, panel.known[1], type]]) {
      if (!seen.has(name)) list.push(name);
      seen.add(name);
    }
    panel.cells.set(cellKey(row, type), index);
  });
  return [...found.values()];
}

export const cellKey = (row, column) => `${row}\n${column}`;
