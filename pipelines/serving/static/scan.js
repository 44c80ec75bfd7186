// A scan as the planes need it, and which of its regions were kept. Arrays are [z, y, x], the world is LPS mm.
// Grids of the server are axis-aligned: x goes to the left of the patient, y to the back, z to the head.

export const HEADER = 352; // bytes before the voxels of the server's NIfTI files

export class Scan {
  // `bytes`: a NIfTI file of int16 on a grid that covers the box of `facts.tokens`.
  constructor(facts, bytes) {
    const header = new DataView(bytes);
    const [nx, ny, nz] = [42, 44, 46].map((at) => header.getInt16(at, true));
    this.id = facts.id;
    this.bytes = bytes;
    this.shape = [nz, ny, nx];
    this.voxels = new Int16Array(bytes, HEADER, nz * ny * nx);
    this.cells = facts.tokens.shape_zyx; // how many tokens
    const size = facts.tokens.spacing_zyx_mm;
    this.low = facts.tokens.origin_lps.map((mm, world) => mm - size[2 - world] / 2); // the corner of the box
    this.extent = this.cells.map((n, axis) => n * size[axis]); // of the box, mm
  }

  // Where an LPS point lies along axis z, y, x, as a share of the box.
  share(world) {
    return [0, 1, 2].map((axis) => (world[2 - axis] - this.low[2 - axis]) / this.extent[axis]);
  }

  world(share) {
    return [0, 1, 2].map((world) => this.low[world] + share[2 - world] * this.extent[2 - world]);
  }

  // The voxel, or with `shape` the box, that holds an LPS point; the nearest where none does.
  index(world, shape = this.shape) {
    return this.share(world).map((part, axis) => Math.min(shape[axis] - 1, Math.max(0, Math.floor(part * shape[axis]))));
  }

  hu(world) {
    const [z, y, x] = this.index(world);
    return this.voxels[(z * this.shape[1] + y) * this.shape[2] + x];
  }

  get middle() {
    return this.world([0.5, 0.5, 0.5]);
  }

  // An LPS point in words: "L 12  P 40  S 210".
  static words(world) {
    const letters = [["R", "L"], ["A", "P"], ["I", "S"]];
    return world.map((mm, axis) => `${letters[axis][Number(mm >= 0)]} ${Math.abs(mm).toFixed(1)}`).join("   ");
  }
}

// What was kept for an answer, by box. Tokens count x from the patient's left, boxes from the right.
export class Regions {
  constructor(cells, kept) {
    const [, rows, columns] = (this.cells = cells);
    const order = kept.kept.map((_, token) => token - (token % columns) + columns - 1 - (token % columns));
    this.saliency = order.map((token) => kept.saliency[token]);
    const all = order.map((token, box) => box).filter((box) => kept.kept[order[box]]);
    this.ranked = all.sort((a, b) => this.saliency[b] - this.saliency[a]); // kept boxes, the most salient first
    this.rows = rows;
    this.columns = columns;
    this.show(all.length);
  }

  get count() {
    return this.ranked.length;
  }

  // Show the `most` most salient ones.
  show(most) {
    this.shown = new Set(this.ranked.slice(0, most));
  }

  number([z, y, x]) {
    return (z * this.rows + y) * this.columns + x;
  }

  has(box) {
    return this.shown.has(this.number(box));
  }

  // The centre of the most salient box, as shares of the volume; null where none stands out.
  get peak() {
    const box = this.ranked[0];
    if (box === undefined || this.saliency[box] === this.saliency[this.ranked.at(-1)]) return null;
    const index = [Math.floor(box / (this.rows * this.columns)), Math.floor(box / this.columns) % this.rows, box % this.columns];
    return index.map((at, axis) => (at + 0.5) / this.cells[axis]);
  }

  common(other) {
    const others = new Set(other.ranked);
    return this.ranked.filter((box) => others.has(box)).length;
  }
}
