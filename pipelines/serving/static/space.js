// The 3D view: NiiVue, where `make viewer` has built it into the package and the browser has WebGL2.

import { COLOURS } from "./planes.js";
import { HEADER } from "./scan.js";

const MISSING = "The 3D view needs NiiVue: run make viewer and start the server again.";
const NO_WEBGL = "The 3D view needs WebGL2, which this browser does not have.";
const FAILED = "The 3D view failed. The planes do not need it.";
const DATATYPE_UINT8 = 2;

export class Space {
  constructor(pane, view) {
    this.pane = pane;
    this.view = view;
    this.canvas = pane.querySelector("canvas");
    this.ready = this.start();
  }

  async start() {
    let niivue;
    try {
      niivue = await import("./niivue.js");
    } catch {
      return this.say(MISSING);
    }
    if (!document.createElement("canvas").getContext("webgl2")) return this.say(NO_WEBGL);
    this.niivue = niivue;
    this.viewer = new niivue.Niivue({
      backColor: [0.027, 0.035, 0.043, 1], crosshairColor: [0.47, 0.86, 0.67, 0.8], show3Dcrosshair: true, crosshairWidth: 0.5,
      isColorbar: false, dragAndDropEnabled: false, logLevel: "error", loadingText: "", textHeight: 0.035,
    });
    await this.viewer.attachToCanvas(this.canvas);
    this.viewer.setSliceType(this.viewer.sliceTypeRender);
    COLOURS.forEach((colour, i) => this.viewer.addColormap(`answer${i}`, colormapOf(colour)));
    return undefined;
  }

  say(sentence) {
    const message = this.pane.querySelector(".message");
    message.textContent = sentence;
    message.hidden = false;
    this.canvas.hidden = true;
  }

  // Draw what the view says now. Drawing is slow without a GPU: what was wanted meanwhile is drawn once.
  async draw() {
    this.isWanted = true;
    if (this.isDrawing) return;
    this.isDrawing = true;
    await this.ready;
    while (this.isWanted && this.viewer) {
      this.isWanted = false;
      await new Promise(requestAnimationFrame); // the planes first
      await this.follow(this.viewer).catch(() => this.say(FAILED));
    }
    this.isDrawing = false;
  }

  async follow(viewer) {
    const { scan, regions, style, level, width, at } = this.view;
    if (!scan) return;
    const shown = [scan, style, level, width, ...regions.map((region) => region.shown)];
    if (shown.length !== this.shown?.length || shown.some((each, i) => each !== this.shown[i])) {
      const before = this.shown?.[0];
      this.shown = shown;
      await this.fill(viewer, scan !== before, style === "none" ? [] : regions);
      Object.assign(viewer.volumes[0], { cal_min: level - width / 2, cal_max: level + width / 2 });
      viewer.updateGLVolume();
    }
    viewer.scene.crosshairPos = viewer.mm2frac([-at[0], -at[1], at[2]]); // NiiVue's world is RAS
    viewer.drawScene();
  }

  async fill(viewer, isOther, regions) {
    const { scan } = this.view;
    while (viewer.volumes.length > (isOther ? 0 : 1)) viewer.removeVolumeByIndex(viewer.volumes.length - 1);
    const add = async (url, name, looks) => viewer.addVolume(Object.assign(await this.niivue.NVImage.loadFromUrl({ url, name }), looks));
    if (isOther) await add(scan.bytes, "scan.nii", { colormap: "gray" });
    for (const [i, region] of regions.entries())
      await add(niftiOf(scan, region), `answer${i}.nii`, { colormap: `answer${i}`, cal_min: 0, cal_max: 1, opacity: 0.12 });
  }
}

const colormapOf = (colour) => {
  const rgb = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
  return { R: [0, rgb[0]], G: [0, rgb[1]], B: [0, rgb[2]], A: [0, 255], I: [0, 255] };
};

// A NIfTI file of uint8 with a voxel per box: 1 where it is shown. The world of NIfTI is RAS.
function niftiOf(scan, region) {
  const [nz, ny, nx] = scan.cells;
  const file = new DataView(new ArrayBuffer(HEADER + nz * ny * nx));
  const size = [2, 1, 0].map((axis) => scan.extent[axis] / scan.cells[axis]); // x, y, z
  const first = scan.low.map((mm, world) => mm + size[world] / 2);
  file.setInt32(0, 348, true);
  [3, nx, ny, nz, 1, 1, 1, 1].forEach((n, i) => file.setInt16(40 + 2 * i, n, true));
  file.setInt16(70, DATATYPE_UINT8, true);
  file.setInt16(72, 8, true); // bits
  [1, ...size].forEach((mm, i) => file.setFloat32(76 + 4 * i, mm, true));
  file.setFloat32(108, HEADER, true);
  file.setFloat32(112, 1, true); // slope
  file.setInt16(254, 1, true); // sform
  [-1, -1, 1].forEach((sign, row) => {
    file.setFloat32(280 + 16 * row + 4 * row, sign * size[row], true);
    file.setFloat32(280 + 16 * row + 12, sign * first[row], true);
  });
  [0x6e, 0x2b, 0x31, 0].forEach((byte, i) => file.setUint8(344 + i, byte)); // "n+1"
  region.shown.forEach((box) => file.setUint8(HEADER + box, 1));
  return file.buffer;
}
