// Three planes of a scan through one point, as radiologists look at them: the patient's right on the left, head up.

import { make } from "./element.js";

// axis: the one (z, y, x) that the plane is cut across; across, down: those of the picture; letters: left, right, top, bottom.
const PLANES = {
  axial: { axis: 0, across: 2, down: 1, isFlipped: false, letters: "RLAP" },
  coronal: { axis: 1, across: 2, down: 0, isFlipped: true, letters: "RLSI" },
  sagittal: { axis: 2, across: 1, down: 0, isFlipped: true, letters: "APSI" },
};
export const COLOURS = ["#f0a35e", "#5aa9ff"]; // of the regions of two answers
const SOFTWARE = { willReadFrequently: true }; // a plane is drawn from memory at each step; a GPU would only be in the way
const LENGTHS_MM = [200, 100, 50, 20, 10, 5];

export class Plane {
  // `view` has scan, at (LPS mm), level, width, style and regions; `onMove` gets a point that was chosen.
  constructor(pane, view, onMove) {
    Object.assign(this, PLANES[pane.dataset.plane]);
    this.pane = pane;
    this.view = view;
    this.onMove = onMove;
    this.canvas = pane.appendChild(make("canvas", { role: "img" }));
    this.caption = pane.appendChild(make("figcaption"));
    ["left", "right", "top", "bottom"].forEach((side, i) =>
      pane.append(make("span", { className: `letter ${side}`, textContent: this.letters[i], ariaHidden: "true" })),
    );
    this.scale = pane.appendChild(make("span", { className: "scale" }));
    this.listen();
    new ResizeObserver(() => this.draw()).observe(pane);
  }

  listen() {
    const { canvas, pane } = this;
    const point = (event) => event.buttons & 1 && this.onMove(this.worldAt(event.offsetX, event.offsetY));
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      point(event);
    });
    canvas.addEventListener("pointermove", point);
    pane.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.step(this.axis, Math.sign(event.deltaY) * (this.axis === 0 ? -1 : 1));
    });
    pane.addEventListener("keydown", (event) => {
      const down = this.isFlipped ? -1 : 1;
      const moves = {
        ArrowLeft: [this.across, -1], ArrowRight: [this.across, 1], ArrowUp: [this.down, -down],
        ArrowDown: [this.down, down], PageUp: [this.axis, 1], PageDown: [this.axis, -1],
      };
      if (!(event.key in moves) || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      this.step(...moves[event.key]);
    });
  }

  // Move by voxels along an axis, from centre to centre.
  step(axis, voxels) {
    const { scan, at } = this.view;
    if (!scan) return;
    const share = scan.share(at);
    const index = Math.min(scan.shape[axis] - 1, Math.max(0, scan.index(at)[axis] + voxels));
    share[axis] = (index + 0.5) / scan.shape[axis];
    this.onMove(scan.world(share));
  }

  // Where the box of the scan lies in the pane, CSS pixels.
  frame() {
    const { clientWidth: width, clientHeight: height } = this.pane;
    const [wide, high] = [this.view.scan.extent[this.across], this.view.scan.extent[this.down]];
    const scale = Math.min(width / wide, height / high);
    return { x: (width - wide * scale) / 2, y: (height - high * scale) / 2, width: wide * scale, height: high * scale, scale };
  }

  worldAt(x, y) {
    const { scan, at } = this.view;
    const frame = this.frame();
    const within = (part) => Math.min(1 - 1e-6, Math.max(0, part));
    const share = scan.share(at);
    const down = within((y - frame.y) / frame.height);
    share[this.across] = within((x - frame.x) / frame.width);
    share[this.down] = this.isFlipped ? 1 - 1e-6 - down : down;
    return scan.world(share);
  }

  draw() {
    const { scan, at } = this.view;
    if (!scan || !this.pane.clientWidth) return;
    const dots = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.pane.clientWidth * dots);
    this.canvas.height = Math.round(this.pane.clientHeight * dots);
    const context = this.canvas.getContext("2d", SOFTWARE);
    context.scale(dots, dots);
    const frame = this.frame();
    context.imageSmoothingQuality = "high";
    context.drawImage(this.slice(), frame.x, frame.y, frame.width, frame.height);
    this.drawRegions(context, frame);
    this.drawCrosshair(context, frame);
    this.label(scan, at, frame);
  }

  // The plane, a pixel per voxel.
  slice() {
    const { scan, at, level, width } = this.view;
    const index = scan.index(at);
    const [nx, ny] = [scan.shape[this.across], scan.shape[this.down]];
    const strides = [scan.shape[1] * scan.shape[2], scan.shape[2], 1];
    const image = new ImageData(nx, ny);
    const greys = new Uint32Array(image.data.buffer);
    const low = level - width / 2;
    for (let y = 0; y < ny; y++) {
      let from = index[this.axis] * strides[this.axis] + (this.isFlipped ? ny - 1 - y : y) * strides[this.down];
      for (let x = 0; x < nx; x++, from += strides[this.across]) {
        const grey = Math.min(255, Math.max(0, Math.round(((scan.voxels[from] - low) / width) * 255)));
        greys[y * nx + x] = 0xff000000 | (grey << 16) | (grey << 8) | grey;
      }
    }
    const picture = new OffscreenCanvas(nx, ny);
    picture.getContext("2d", SOFTWARE).putImageData(image, 0, 0);
    return picture;
  }

  // A line around the kept boxes of each answer, or shade over what neither kept.
  drawRegions(context, frame) {
    const { scan, at, regions, style } = this.view;
    if (style === "none" || !regions.length) return;
    const [nx, ny] = [scan.cells[this.across], scan.cells[this.down]];
    const box = scan.index(at, scan.cells);
    const [wide, high] = [frame.width / nx, frame.height / ny];
    const has = (region, x, y) => {
      if (x < 0 || y < 0 || x >= nx || y >= ny) return false;
      box[this.across] = x;
      box[this.down] = this.isFlipped ? ny - 1 - y : y;
      return region.has(box);
    };
    const boxes = Array.from({ length: nx * ny }, (_, i) => [i % nx, Math.floor(i / nx)]);
    const edge = (start, size, n) => Math.round(start + n * size);
    const place = (x, y) => [edge(frame.x, wide, x), edge(frame.y, high, y), edge(frame.x, wide, x + 1), edge(frame.y, high, y + 1)];
    if (style === "dim")
      for (const [x, y] of boxes)
        if (!regions.some((region) => has(region, x, y))) shade(context, ...place(x, y));
    regions.forEach((region, i) => {
      for (const [x, y] of boxes)
        if (has(region, x, y)) outline(context, i, ...place(x, y), (dx, dy) => has(region, x + dx, y + dy));
    });
  }

  drawCrosshair(context, frame) {
    const { scan, at } = this.view;
    const share = scan.share(at);
    const down = this.isFlipped ? 1 - share[this.down] : share[this.down];
    const [x, y, gap] = [frame.x + share[this.across] * frame.width, frame.y + down * frame.height, 9];
    context.strokeStyle = "rgba(120, 220, 170, 0.75)";
    context.lineWidth = 1;
    context.beginPath();
    for (const [x0, y0, x1, y1] of [[frame.x, y, x - gap, y], [x + gap, y, frame.x + frame.width, y],
      [x, frame.y, x, y - gap], [x, y + gap, x, frame.y + frame.height]]) {
      if (x1 < x0 || y1 < y0) continue;
      context.moveTo(x0, y0);
      context.lineTo(x1, y1);
    }
    context.stroke();
  }

  label(scan, at, frame) {
    const name = this.pane.dataset.plane;
    const place = `${scan.index(at)[this.axis] + 1} of ${scan.shape[this.axis]}`;
    this.caption.textContent = `${name[0].toUpperCase()}${name.slice(1)}  ${place}`;
    this.canvas.ariaLabel = `${name} plane, slice ${place}`;
    const length = LENGTHS_MM.find((mm) => mm * frame.scale <= this.pane.clientWidth / 4) ?? LENGTHS_MM.at(-1);
    this.scale.style.width = `${length * frame.scale}px`;
    this.scale.textContent = length >= 10 ? `${length / 10} cm` : `${length} mm`;
  }
}

function shade(context, x, y, right, bottom) {
  context.fillStyle = "rgba(5, 7, 9, 0.72)";
  context.fillRect(x, y, right - x, bottom - y);
}

// Draw the edges of a box that the next box is not part of; for the second answer dashed, so that both are seen.
function outline(context, number, x, y, right, bottom, hasNext) {
  context.strokeStyle = COLOURS[number];
  context.lineWidth = 2;
  context.setLineDash(number ? [6, 6] : []);
  context.beginPath();
  for (const [dx, dy, ...line] of [[-1, 0, x, y, x, bottom], [1, 0, right, y, right, bottom], [0, -1, x, y, right, y],
    [0, 1, x, bottom, right, bottom]]) {
    if (hasNext(dx, dy)) continue;
    context.moveTo(line[0], line[1]);
    context.lineTo(line[2], line[3]);
  }
  context.stroke();
  context.setLineDash([]);
}
