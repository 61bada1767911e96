// A loss landscape that turns: the surface above its contour map, drawn on a canvas.
// Each <figure class="landscape"> of the page becomes a viewer. Nothing is loaded.
(() => {
"use strict";

const FLOOR = -0.85, LOW = -0.25, HIGH = 0.65; // heights of the map, of the least and largest loss
const YAW = -0.6, PITCH = 0.78; // radians, at the start
const ABOVE = Math.PI / 2; // the contour map alone
const BANDS = 20; // of the contour map
const LIGHT = [-0.45, 0.55, 0.7]; // from the left, from above, from the viewer
const MARGIN = { left: 64, right: 104, top: 12, bottom: 30 }; // CSS pixels

const COLOURS = (() => { // matplotlib's viridis: red, green and blue of 256 colours
  const anchors = ("440154 481769 472a7a 433d84 3d4e8a 355e8d 2e6d8e 297b8e 23898e 1f978b 21a585" +
    " 2eb37c 46c06f 65cb5e 89d548 b0dd2f d8e219 fde725").split(" ").map((hex) => parseInt(hex, 16));
  return Float32Array.from({ length: 768 }, (_, k) => {
    const at = Math.floor(k / 3) / 15, i = Math.min(Math.floor(at), 16), shift = 16 - 8 * (k % 3);
    const low = anchors[i] >> shift & 255, high = anchors[i + 1] >> shift & 255;
    return low + (high - low) * (at - i);
  });
})();

// A number with the digits that distinguish it from others a step away.
function text(value, step) {
  const size = Math.abs(value), digits = Math.floor(Math.log10(step) + 1e-9);
  if (size < step / 2) return "0";
  if (size >= 1e5 || size < 1e-3) {
    const places = Math.max(0, Math.floor(Math.log10(size)) - digits);
    return value.toExponential(Math.min(places, 15)).replace("e+", "e");
  }
  return value.toFixed(Math.min(Math.max(0, -digits), 15));
}

// About `count` numbers from low to high that are 1, 2 or 5 times a power of ten apart.
function ticks(low, high, count) {
  const least = (high - low) / count, power = 10 ** Math.floor(Math.log10(least));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= least * 0.999);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-6); k * step <= high + 1e-6 * step; k++) {
    found.push({ at: k * step, text: text(k * step, step) });
  }
  return found;
}

// Ticks between two logarithms: powers of ten, with 2 and 5 times them if they are few.
function logTicks(low, high, count) {
  const stride = Math.ceil((high - low) / count), found = [];
  const factors = high - low > count / 3 ? [1] : [1, 2, 5];
  for (let power = Math.floor(low / stride) * stride; power <= high; power += stride) {
    for (const factor of factors) {
      found.push({ at: power + Math.log10(factor), text: text(factor * 10 ** power, 10 ** power) });
    }
  }
  const inside = found.filter(({ at }) => at > low - 1e-6 && at < high + 1e-6);
  if (inside.length > 1) return inside;
  return ticks(10 ** low, 10 ** high, count).map((tick) => ({ ...tick, at: Math.log10(tick.at) }));
}

const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];

// A picture in the making: the colour and the depth of each pixel; depths grow from the viewer.
class Frame {
  constructor(width, height) {
    Object.assign(this, { width, height });
    this.canvas = Object.assign(document.createElement("canvas"), { width, height });
    this.image = new ImageData(width, height);
    this.pixels = new Uint32Array(this.image.data.buffer);
    this.depths = new Float32Array(width * height);
  }

  clear() {
    this.pixels.fill(0);
    this.depths.fill(Infinity);
  }

  show() {
    this.canvas.getContext("2d").putImageData(this.image, 0, 0);
  }

  // Fills a triangle of vertices [x, y, depth, t, light, w]. The height t, from 0 to 1, gives the
  // colour. In a contour map it is that of a band, with lines between bands; otherwise it is
  // shaded, and the line w = 0 is a line of the grid.
  triangle(a, b, c, map, grid) {
    const { width, height, pixels, depths } = this;
    const bx = b[0] - a[0], by = b[1] - a[1], cx = c[0] - a[0], cy = c[1] - a[1];
    const area = bx * cy - cx * by;
    if (Math.abs(area) < 1e-9) return;
    const slopeX = (k) => ((b[k] - a[k]) * cy - (c[k] - a[k]) * by) / area;
    const slopeY = (k) => ((c[k] - a[k]) * bx - (b[k] - a[k]) * cx) / area;
    const dx = slopeX(2), dy = slopeY(2), tx = slopeX(3), ty = slopeY(3);
    const lx = slopeX(4), ly = slopeY(4), wx = slopeX(5), wy = slopeY(5);
    const side = area < 0 ? 1 : -1; // -1: seen from below
    const band = Math.max(BANDS * Math.hypot(tx, ty), 1e-9); // bands per pixel
    const reach = Math.max(grid * Math.hypot(wx, wy), 1e-9);
    const last = Math.min(height, Math.ceil(Math.max(a[1], b[1], c[1]) - 0.5));
    for (let y = Math.max(0, Math.ceil(Math.min(a[1], b[1], c[1]) - 0.5)); y < last; y++) {
      let left = Infinity, right = -Infinity;
      for (const [p, q] of [[a, b], [b, c], [c, a]]) {
        const [top, end] = p[1] < q[1] ? [p, q] : [q, p];
        if (top[1] > y + 0.5 || end[1] <= y + 0.5) continue;
        const x = top[0] + (end[0] - top[0]) * (y + 0.5 - top[1]) / (end[1] - top[1]);
        left = Math.min(left, x);
        right = Math.max(right, x);
      }
      const stop = Math.min(width, Math.ceil(right - 0.5));
      for (let x = Math.max(0, Math.ceil(left - 0.5)); x < stop; x++) {
        const u = x + 0.5 - a[0], v = y + 0.5 - a[1], at = y * width + x;
        const depth = a[2] + dx * u + dy * v;
        if (depth >= depths[at]) continue;
        depths[at] = depth;
        let t = Math.min(Math.max(a[3] + tx * u + ty * v, 0), 1), shade, white = 0;
        if (map) {
          const level = t * BANDS, near = Math.round(level);
          if (near > 0 && near < BANDS) {
            white = 0.55 * Math.max(0, 1 - Math.abs(level - near) / band / (0.5 * grid + 0.5));
          }
          t = (Math.min(Math.floor(level), BANDS - 1) + 0.5) / BANDS;
          shade = 1;
        } else {
          shade = 0.55 + 0.5 * Math.max(0, side * (a[4] + lx * u + ly * v));
          if (side < 0) shade *= 0.8;
          const w = a[5] + wx * u + wy * v;
          if (w < reach) shade *= 0.8 + 0.2 * w / reach;
        }
        const k = 3 * Math.round(t * 255), add = 255 * white, keep = (1 - white) * shade;
        const red = Math.min(255, COLOURS[k] * keep + add);
        const green = Math.min(255, COLOURS[k + 1] * keep + add);
        const blue = Math.min(255, COLOURS[k + 2] * keep + add);
        pixels[at] = 0xff000000 | blue << 16 | green << 8 | red; // little-endian, as all browsers
      }
    }
  }
}

// Losses on a grid, their heights in a scale, and the normals of the surface.
class Surface {
  constructor({ alphas, betas, losses, trajectory }) {
    Object.assign(this, { alphas, betas, losses, trajectory });
    this.p = alphas.length;
    this.q = betas.length;
    const finite = losses.filter((loss) => loss !== null);
    this.low = finite.reduce((a, b) => Math.min(a, b), finite[0] ?? NaN);
    this.high = finite.reduce((a, b) => Math.max(a, b), finite[0] ?? NaN);
    this.lowest = losses.indexOf(this.low);
  }

  // Sets the heights t, 0 at `low` and 1 at `high`, and NaN in holes.
  scale(log, low, high) {
    const to = log ? Math.log10 : (loss) => loss;
    [this.from, this.to] = [to(low), to(high)];
    const span = this.to > this.from ? this.to - this.from : 1;
    this.t = this.losses.map((loss) => loss === null ? NaN : (to(loss) - this.from) / span);
    this.normals = this.t.map((_, at) => this.normal(Math.floor(at / this.q), at % this.q));
  }

  position(i, j) { // in the box, which is a square from -1 to 1
    const place = (axis, k) => 2 * (axis[k] - axis[0]) / (axis[axis.length - 1] - axis[0]) - 1;
    return [place(this.alphas, i), place(this.betas, j)];
  }

  normal(i, j) {
    const slope = (i0, j0, i1, j1, axis) => {
      if (Number.isNaN(this.t[i0 * this.q + j0])) [i0, j0] = [i, j];
      if (Number.isNaN(this.t[i1 * this.q + j1])) [i1, j1] = [i, j];
      const run = this.position(i1, j1)[axis] - this.position(i0, j0)[axis];
      const rise = (this.t[i1 * this.q + j1] - this.t[i0 * this.q + j0]) * (HIGH - LOW);
      return run > 0 ? rise / run : 0;
    };
    const x = -slope(Math.max(i - 1, 0), j, Math.min(i + 1, this.p - 1), j, 0);
    const y = -slope(i, Math.max(j - 1, 0), i, Math.min(j + 1, this.q - 1), 1);
    const length = Math.hypot(x, y, 1);
    return [x / length, y / length, 1 / length];
  }

  // Position [x, y, t] of a point of the plane, interpolated; t is NaN in holes and outside.
  at(alpha, beta) {
    const place = (axis, value) => {
      const last = axis.length - 1, k = Math.min(axis.findLastIndex((v) => v <= value), last - 1);
      return [k, (value - axis[k]) / (axis[k + 1] - axis[k])];
    };
    const [i, u] = place(this.alphas, alpha), [j, v] = place(this.betas, beta);
    if (!(u >= 0 && u <= 1 && v >= 0 && v <= 1)) return [0, 0, NaN];
    const t = (di, dj) => this.t[(i + di) * this.q + j + dj];
    const [x0, y0] = this.position(i, j), [x1, y1] = this.position(i + 1, j + 1);
    const low = u === 0 ? t(0, 0) : t(0, 0) * (1 - u) + t(1, 0) * u;
    const next = u === 0 ? t(0, 1) : t(0, 1) * (1 - u) + t(1, 1) * u;
    return [x0 + u * (x1 - x0), y0 + v * (y1 - y0), v === 0 ? low : low * (1 - v) + next * v];
  }
}

class Viewer {
  constructor(figure) {
    this.figure = figure;
    this.canvas = figure.querySelector("canvas");
    this.output = figure.querySelector("output");
    this.scripts = [...figure.querySelectorAll("script")];
    this.fingers = new Map();
    this.common = false;
    this.button = (name) => figure.querySelector(`[data-do=${name}]`);
    figure.classList.add("live");
    this.listen();
    this.reset();
    this.choose(this.scripts[0]);
  }

  listen() {
    const { canvas, fingers } = this;
    const actions = {
      log: () => { this.log = !this.log; this.measure(); },
      above: () => {
        this.reset();
        Object.assign(this, { yaw: 0, pitch: ABOVE, zoom: 1.35 });
        this.draw();
      },
      reset: () => { this.reset(); this.draw(); },
      common: () => { this.common = !this.common; this.measure(); },
    };
    for (const [name, action] of Object.entries(actions)) {
      this.button(name)?.addEventListener("click", action);
    }
    for (const select of this.figure.querySelectorAll("select")) {
      select.addEventListener("change", () => this.choose(this.nearest(select)));
    }
    const turns = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    canvas.addEventListener("keydown", (event) => {
      const key = event.key, named = { l: "log", a: "above", r: "reset", Home: "reset" }[key];
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (turns[key]) this.turn(8 * turns[key][0], 8 * turns[key][1]);
      else if ("+=-".includes(key)) this.zoomAt(key === "-" ? 1 / 1.2 : 1.2, ...this.centre());
      else if (named && !this.button(named).disabled) actions[named]();
      else return;
      event.preventDefault();
    });
    canvas.addEventListener("wheel", (event) => {
      if (document.activeElement !== canvas && !event.ctrlKey) return; // the page scrolls
      event.preventDefault();
      this.zoomAt(Math.exp(-0.0015 * event.deltaY), event.offsetX, event.offsetY);
    }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      canvas.focus();
      canvas.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, [event.offsetX, event.offsetY]);
    });
    canvas.addEventListener("pointermove", (event) => {
      const here = [event.offsetX, event.offsetY], before = fingers.get(event.pointerId);
      if (!before) return this.hover(...here);
      fingers.set(event.pointerId, here);
      if (fingers.size === 1) return this.turn(here[0] - before[0], here[1] - before[1]);
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1];
      const distance = (point) => Math.hypot(point[0] - other[0], point[1] - other[1]);
      this.zoomAt(distance(here) / Math.max(distance(before), 1), ...other);
    });
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, (event) => fingers.delete(event.pointerId));
    }
    canvas.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.draw()).observe(canvas);
    window.addEventListener("resize", () => this.draw()); // also another pixel ratio
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  // The surface that agrees with the changed choice, and otherwise with most others.
  nearest(changed) {
    const selects = [...this.figure.querySelectorAll("select")];
    const agreement = (script) => JSON.parse(script.dataset.key)
      .map((word, k) => (word === selects[k].value) * (selects[k] === changed ? 100 : 1))
      .reduce((a, b) => a + b);
    return this.scripts.reduce((best, s) => agreement(s) > agreement(best) ? s : best);
  }

  choose(script) {
    const key = JSON.parse(script.dataset.key);
    this.figure.querySelectorAll("select").forEach((select, k) => { select.value = key[k]; });
    this.surface = new Surface(JSON.parse(script.textContent));
    this.canvas.setAttribute("aria-label", script.dataset.label);
    this.figure.querySelector("[data-words]").textContent = script.dataset.words;
    this.log ??= this.surface.low > 0 && this.surface.high > 100 * this.surface.low;
    this.measure();
  }

  measure() {
    const { surface } = this;
    const all = JSON.parse(this.figure.dataset.range);
    const [low, high] = this.common ? all : [surface.low, surface.high];
    const log = this.log && low > 0;
    this.button("log").disabled = !(low > 0);
    this.button("log").setAttribute("aria-pressed", log);
    this.button("common")?.setAttribute("aria-pressed", this.common);
    surface.scale(log, low, high);
    const { from, to } = surface;
    this.marks = to > from ? (log ? logTicks : ticks)(from, to, 6)
      : [{ at: from, text: String(surface.low) }];
    this.unit = log ? "loss (log scale)" : "loss";
    this.point(null);
    this.draw();
  }

  reset() {
    Object.assign(this, { yaw: YAW, pitch: PITCH, zoom: 1, shift: [0, 0] });
  }

  turn(x, y) {
    this.yaw += 0.01 * x;
    this.pitch = Math.min(Math.max(this.pitch + 0.01 * y, 0), ABOVE);
    this.point(null);
    this.draw(true);
  }

  // Enlarges around a point of the canvas, which stays where it is.
  zoomAt(factor, x, y) {
    const zoom = Math.min(Math.max(this.zoom * factor, 0.5), 20), centre = this.centre();
    this.shift = [x, y].map((v, k) =>
      this.shift[k] + (v - centre[k]) * (1 - zoom / this.zoom));
    this.zoom = zoom;
    this.point(null);
    this.draw(true);
  }

  draw(moving = false) {
    this.moving = moving;
    clearTimeout(this.pause);
    if (moving) this.pause = setTimeout(() => this.draw(), 150); // then with smooth edges
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = undefined;
      this.render();
    });
  }

  render() {
    const { canvas } = this, ratio = window.devicePixelRatio;
    [this.width, this.height] = [canvas.clientWidth, canvas.clientHeight];
    if (this.width <= MARGIN.right) return; // hidden
    canvas.width = Math.round(this.width * ratio);
    canvas.height = Math.round(this.height * ratio);
    this.raster(this.moving ? ratio : Math.max(2, ratio));
    this.paint();
  }

  centre() {
    return [(MARGIN.left + this.width - MARGIN.right) / 2 + this.shift[0],
      (MARGIN.top + this.height - MARGIN.bottom) / 2 + this.shift[1]];
  }

  // The unit vectors to the right, up and away from the viewer.
  camera() {
    const [c, s, cp, sp] = [Math.cos(this.yaw), Math.sin(this.yaw), Math.cos(this.pitch),
      Math.sin(this.pitch)];
    return [[c, -s, 0], [s * sp, c * sp, cp], [s * cp, c * cp, -sp]];
  }

  // From the box to CSS pixels of the canvas and the depth; parallel lines stay parallel.
  projection() {
    const size = this.zoom * Math.min((this.width - MARGIN.left - MARGIN.right) / 2.83,
      (this.height - MARGIN.top - MARGIN.bottom) / 3);
    const [cx, cy] = this.centre(), [right, up, away] = this.camera();
    return ([x, y, z]) => [cx + size * dot(right, [x, y, z]), cy - size * dot(up, [x, y, z]),
      dot(away, [x, y, z]), size];
  }

  raster(resolution) {
    const { p, q, t, normals } = this.surface;
    const width = Math.round((this.width - MARGIN.right) * resolution);
    const height = Math.round(this.height * resolution);
    if (this.frame?.width !== width || this.frame.height !== height) {
      this.frame = new Frame(width, height);
    }
    this.resolution = resolution;
    this.frame.clear();
    const [right, up, away] = this.camera(), project = this.projection();
    const light = [0, 1, 2].map((k) =>
      (LIGHT[0] * right[k] + LIGHT[1] * up[k] - LIGHT[2] * away[k]) / Math.hypot(...LIGHT));
    const cell = 2 * project([0, 0, 0])[3] / Math.max(p, q);
    for (const floor of this.pitch < ABOVE ? [false, true] : [false]) {
      const map = floor || this.pitch === ABOVE;
      const vertices = t.map((height, at) => {
        const [x, y] = this.surface.position(Math.floor(at / q), at % q);
        const [sx, sy, depth] = project([x, y, floor ? FLOOR : LOW + height * (HIGH - LOW)]);
        return [sx * resolution, sy * resolution, depth, height, dot(light, normals[at]), 0];
      });
      const grid = map || cell > 6 ? resolution : 0;
      for (let at = 0; at < (p - 1) * q; at++) {
        if (at % q === q - 1) continue;
        const corners = [at, at + q, at + q + 1, at + 1].map((k) => vertices[k]);
        if (corners.some((corner) => Number.isNaN(corner[3]))) continue;
        const middle = [0, 1, 2, 3, 4].map((k) =>
          (corners[0][k] + corners[1][k] + corners[2][k] + corners[3][k]) / 4);
        middle.push(1);
        for (let k = 0; k < 4; k++) {
          this.frame.triangle(corners[k], corners[(k + 1) % 4], middle, map, grid);
        }
      }
    }
    this.frame.show();
  }

  // Puts the picture between the walls and the axes.
  paint() {
    const pen = this.canvas.getContext("2d"), ratio = window.devicePixelRatio;
    const style = getComputedStyle(this.figure), project = this.projection();
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, this.width, this.height);
    pen.font = `12px ${style.fontFamily}`;
    pen.strokeStyle = pen.fillStyle = style.color;
    pen.textBaseline = "middle";
    pen.imageSmoothingQuality = "high";
    if (!Number.isFinite(this.surface.low)) {
      pen.textAlign = "center";
      pen.fillText("no loss of this landscape is finite", this.width / 2, this.height / 2);
      return;
    }
    pen.save();
    pen.beginPath();
    pen.rect(0, 0, this.width - MARGIN.right, this.height);
    pen.clip();
    // the sides of the box that face the viewer
    const x = Math.sin(this.yaw) > 0 ? -1 : 1, y = Math.cos(this.yaw) > 0 ? -1 : 1;
    const line = (...points) => {
      pen.beginPath();
      for (const point of points) pen.lineTo(...project(point).slice(0, 2));
      pen.stroke();
    };
    pen.lineWidth = 1;
    pen.globalAlpha = 0.25;
    for (const { z } of this.levels()) line([x, -y, z], [-x, -y, z], [-x, y, z]);
    for (const corner of [[x, -y], [-x, -y], [-x, y]]) line([...corner, FLOOR], [...corner, HIGH]);
    pen.globalAlpha = 1;
    pen.drawImage(this.frame.canvas, 0, 0, this.width - MARGIN.right, this.height);
    const { alphas, betas, p, q } = this.surface;
    line([-1, y, FLOOR], [1, y, FLOOR]);
    line([x, -1, FLOOR], [x, 1, FLOOR]);
    const down = (vector) => { // on the screen, where labels are legible below the edge
      const [a, b] = [project(vector), project([0, 0, 0])], length = Math.hypot(...vector);
      const [u, v] = [(a[0] - b[0]) / a[3] / length, (a[1] - b[1]) / a[3] / length + 0.35 * Math.cos(this.pitch)];
      return [u / Math.hypot(u, v), v / Math.hypot(u, v)];
    };
    const places = (axis, last, point) => (count) => ticks(axis[0], axis[last], count)
      .map(({ at, text }) => [point(2 * (at - axis[0]) / (axis[last] - axis[0]) - 1), text]);
    this.axis(pen, project, places(alphas, p - 1, (u) => [u, y, FLOOR]), down([0, y, 0]),
      [[-1, y, FLOOR], [1, y, FLOOR]], "α");
    this.axis(pen, project, places(betas, q - 1, (u) => [x, u, FLOOR]), down([x, 0, 0]),
      [[x, -1, FLOOR], [x, 1, FLOOR]], "β");
    const left = project([x, -y, 0])[0] < project([-x, y, 0])[0] ? [x, -y] : [-x, y];
    line([...left, LOW], [...left, HIGH]);
    this.axis(pen, project, () => this.levels().map(({ z, text }) => [[...left, z], text]), [-1, 0],
      [[...left, LOW], [...left, HIGH]], "");
    this.markers(pen, project);
    pen.restore();
    this.bar(pen);
  }

  // The ticks of the loss with their heights in the box.
  levels() {
    const { from, to } = this.surface, span = to > from ? to - from : 1;
    return this.marks.map(({ at, text }) => ({ z: LOW + (at - from) / span * (HIGH - LOW), text }));
  }

  axis(pen, project, places, [u, v], ends, name) {
    const [a, b] = ends.map(project), length = Math.hypot(a[0] - b[0], a[1] - b[1]);
    if (length < 45) return;
    pen.textAlign = u < -0.35 ? "right" : u > 0.35 ? "left" : "center";
    let widest = 0;
    for (const [point, label] of places(Math.min(Math.max(length / 60, 2), 7))) {
      const [sx, sy] = project(point);
      pen.beginPath();
      pen.moveTo(sx, sy);
      pen.lineTo(sx + 5 * u, sy + 5 * v);
      pen.stroke();
      pen.fillText(label, sx + 8 * u, sy + 14 * v);
      widest = Math.max(widest, pen.measureText(label).width);
    }
    const reach = [16 + widest * Math.abs(u), 34];
    pen.fillText(name, (a[0] + b[0]) / 2 + reach[0] * u, (a[1] + b[1]) / 2 + reach[1] * v);
  }

  // The trajectory, the model, the lowest point and the point under the pointer.
  markers(pen, project) {
    const { surface, frame, resolution } = this, { alphas, betas, t, q } = surface;
    const place = ([x, y, height]) => {
      const [sx, sy, depth] = project([x, y, LOW + height * (HIGH - LOW)]);
      const at = Math.floor(sy * resolution) * frame.width + Math.floor(sx * resolution);
      return { sx, sy, hidden: depth > frame.depths[at] + 0.03 };
    };
    const disc = (sx, sy, radius, colour) => {
      pen.beginPath();
      pen.arc(sx, sy, radius, 0, 2 * Math.PI);
      Object.assign(pen, { fillStyle: colour, strokeStyle: "#000", lineWidth: 1 });
      pen.fill();
      pen.stroke();
    };
    const star = (sx, sy) => {
      pen.beginPath();
      for (let k = 0; k < 10; k++) {
        const radius = k % 2 ? 4.2 : 10, angle = Math.PI * (k / 5 - 0.5);
        pen.lineTo(sx + radius * Math.cos(angle), sy + radius * Math.sin(angle));
      }
      pen.closePath();
      Object.assign(pen, { fillStyle: "#ff5a36", strokeStyle: "#fff", lineWidth: 1 });
      pen.fill();
      pen.stroke();
    };
    const legend = [];
    const mark = (point, symbol, name) => {
      if (Number.isNaN(point[2])) return;
      const { sx, sy, hidden } = place(point);
      pen.globalAlpha = hidden ? 0.4 : 1;
      symbol(sx, sy);
      pen.globalAlpha = 1;
      legend.push([symbol, name]);
    };
    const path = surface.trajectory.map(([alpha, beta]) => surface.at(alpha, beta));
    path.slice(1).forEach((end, k) => {
      const [from, to] = [surface.trajectory[k], surface.trajectory[k + 1]];
      for (let part = 0; part < 16; part++) { // along the surface
        const [a, b] = [part, part + 1].map((n) => surface.at(
          from[0] + (to[0] - from[0]) * n / 16, from[1] + (to[1] - from[1]) * n / 16));
        if (Number.isNaN(a[2] + b[2])) continue;
        const [start, stop] = [place(a), place(b)];
        pen.globalAlpha = stop.hidden ? 0.4 : 1;
        for (const [colour, lineWidth] of [["#fff", 4], ["#d4145a", 2]]) {
          Object.assign(pen, { strokeStyle: colour, lineWidth });
          pen.beginPath();
          pen.moveTo(start.sx, start.sy);
          pen.lineTo(stop.sx, stop.sy);
          pen.stroke();
        }
      }
    });
    for (const point of path) mark(point, (sx, sy) => disc(sx, sy, 3, "#d4145a"), "trajectory");
    const [i, j] = [Math.floor(surface.lowest / q), surface.lowest % q];
    mark([...surface.position(i, j), t[surface.lowest]], star, "lowest on the grid");
    mark(surface.at(0, 0), (sx, sy) => disc(sx, sy, 3.5, "#fff"), "the model");
    const names = new Map(legend.map(([symbol, name]) => [name, symbol]));
    [...names].forEach(([name, symbol], k) => {
      symbol(14, 14 + 19 * k);
      Object.assign(pen, { fillStyle: getComputedStyle(this.figure).color, textAlign: "left" });
      pen.fillText(name, 28, 14 + 19 * k);
    });
    if (!this.pointed) return;
    const [m, n] = this.pointed, here = surface.position(m, n), height = t[m * q + n];
    const { sx, sy } = place([...here, height]), [fx, fy] = project([...here, FLOOR]);
    Object.assign(pen, { strokeStyle: "#fff", lineWidth: 1.5 });
    pen.setLineDash([3, 3]);
    pen.beginPath();
    pen.moveTo(sx, sy);
    pen.lineTo(fx, fy);
    pen.stroke();
    pen.setLineDash([]);
    disc(fx, fy, 3, "#fff");
    disc(sx, sy, 5, "#ffb000");
  }

  bar(pen) {
    const x = this.width - MARGIN.right + 10, top = 44, height = Math.min(this.height - 84, 340);
    const colour = getComputedStyle(this.figure).color;
    pen.fillStyle = pen.createLinearGradient(0, top + height, 0, top);
    for (let k = 0; k < 256; k += 15) {
      const colour = `rgb(${COLOURS.slice(3 * k, 3 * k + 3).join(" ")})`;
      pen.fillStyle.addColorStop(k / 255, colour);
    }
    pen.fillRect(x, top, 14, height);
    Object.assign(pen, { fillStyle: colour, strokeStyle: colour, lineWidth: 1, textAlign: "left" });
    const { from, to } = this.surface, span = to > from ? to - from : 1;
    for (const { at, text } of this.marks) {
      const y = top + height * (1 - (at - from) / span);
      pen.beginPath();
      pen.moveTo(x + 14, y);
      pen.lineTo(x + 18, y);
      pen.stroke();
      pen.fillText(text, x + 22, y);
    }
    pen.fillText(this.unit, x, top - 20);
  }

  hover(x, y) {
    const { surface, frame, resolution } = this;
    if (!frame || x >= this.width - MARGIN.right) return this.point(null);
    const at = Math.floor(y * resolution) * frame.width + Math.floor(x * resolution);
    const depth = frame.depths[at];
    if (!Number.isFinite(depth)) return this.point(null);
    const [cx, cy] = this.centre(), size = this.projection()([0, 0, 0])[3];
    const [right, up, away] = this.camera(), u = (x - cx) / size, v = (cy - y) / size;
    const where = [0, 1].map((k) => right[k] * u + up[k] * v + away[k] * depth);
    const nearest = (count, position, value) => {
      let best = 0;
      for (let k = 1; k < count; k++) {
        if (Math.abs(position(k) - value) < Math.abs(position(best) - value)) best = k;
      }
      return best;
    };
    const i = nearest(surface.p, (k) => surface.position(k, 0)[0], where[0]);
    const j = nearest(surface.q, (k) => surface.position(0, k)[1], where[1]);
    this.point([i, j], x, y);
  }

  // Shows the loss at a point of the grid beside the pointer.
  point(at, x, y) {
    const { surface, output } = this;
    const changed = String(at) !== String(this.pointed ?? null);
    this.pointed = at;
    output.hidden = !at;
    if (at) {
      const [i, j] = at, loss = surface.losses[i * surface.q + j];
      output.textContent = `α = ${surface.alphas[i]}\nβ = ${surface.betas[j]}\nloss = ${loss}`;
      output.style.left = `${x > this.width / 2 ? x - output.offsetWidth - 14 : x + 14}px`;
      output.style.top = `${Math.max(y - output.offsetHeight - 8, 0)}px`;
    }
    if (changed && this.frame) this.paint();
  }

  // Where a point of the grid is seen, in CSS pixels of the canvas.
  screen(i, j) {
    const { surface } = this, height = LOW + surface.t[i * surface.q + j] * (HIGH - LOW);
    return this.projection()([...surface.position(i, j), height]).slice(0, 2);
  }
}

document.addEventListener("DOMContentLoaded", () => {
  for (const figure of document.querySelectorAll("figure.landscape")) {
    figure.viewer = new Viewer(figure);
  }
});
})();
