// A fixed square with pictures in it: pixels are enlarged by whole factors of the screen's own, and stay sharp.

const GAP = 4; // CSS pixels between pictures
/** Of the line of headings above the pictures, and of the column of names before them, in CSS pixels. */
export const HEAD_HEIGHT = 24;
export const headWidth = (side) => Math.min(112, Math.round(side * 0.2));

export class Stage {
  /** `pick(index)` is called for a picture that is pressed; without it pictures cannot be pressed. */
  constructor(element, pick = null) {
    this.element = element;
    this.pick = pick;
    this.grid = document.createElement("div");
    this.grid.className = "tiles";
    element.replaceChildren(this.grid);
    this.tiles = [];
    this.columns = 0;
    new ResizeObserver(() => this.#fit()).observe(element);
    if (pick) {
      this.grid.addEventListener("keydown", (event) => this.#move(event));
      this.grid.addEventListener("click", (event) => {
        const index = this.tiles.findIndex((tile) => tile.element === event.target.closest(".tile"));
        if (index >= 0) pick(index);
      });
    }
  }

  /**
   * Shows the pictures of a sheet: `count` of [width, height] pixels, near square as the server lays them out.
   * labels: what each is, for who cannot see it. rows: headings before each row of `columns` pictures.
   */
  show(bitmap, { count, width, height, labels, columns = squareColumns(count), rows = null, heads = null }) {
    const laidOut = `${count} ${width} ${height} ${columns} ${rows} ${heads}`;
    if (laidOut !== this.laidOut) {
      this.#build({ count, width, height, columns, rows, heads });
      this.laidOut = laidOut;
    }
    const across = bitmap.width / width;
    this.tiles.forEach((tile, index) => {
      const x = (index % across) * width;
      const y = Math.floor(index / across) * height;
      tile.context.drawImage(bitmap, x, y, width, height, 0, 0, width, height);
      if (this.pick && tile.label !== labels[index]) {
        tile.label = labels[index];
        tile.element.setAttribute("aria-label", labels[index]);
        tile.element.title = labels[index];
      }
    });
    this.element.dataset.shown = String(Number(this.element.dataset.shown ?? 0) + 1);
  }

  /** The pixels of all pictures, one canvas of the sheet's size: what is saved. */
  get pictures() {
    return this.tiles.map((tile) => tile.canvas);
  }

  #build({ count, width, height, columns, rows, heads }) {
    Object.assign(this, { columns, width, height, rows });
    const cells = [];
    if (heads) {
      if (rows) cells.push(text("span", ""));
      cells.push(...heads.map((head) => text("span", head, "head")));
    }
    this.tiles = Array.from({ length: count }, (_, index) => {
      if (rows && index % columns === 0) cells.push(text("span", rows[index / columns], "row-head"));
      const tile = this.#tile(width, height, index);
      cells.push(tile.element);
      return tile;
    });
    this.grid.replaceChildren(...cells);
    this.#fit();
  }

  #tile(width, height, index) {
    const canvas = Object.assign(document.createElement("canvas"), { width, height });
    const element = document.createElement(this.pick ? "button" : "span");
    element.className = "tile";
    if (this.pick) {
      element.type = "button";
      element.tabIndex = index === 0 ? 0 : -1; // one stop for the Tab key; arrows move within
    }
    element.append(canvas);
    return { element, canvas, context: canvas.getContext("2d") };
  }

  #fit() {
    if (!this.tiles.length) return;
    const side = this.element.clientWidth;
    const heads = this.rows ? headWidth(side) : 0;
    const lines = Math.ceil(this.tiles.length / this.columns) || 1;
    const gap = this.rows || this.tiles.length > 16 ? GAP / 2 : GAP;
    const across = (side - heads - gap * (this.columns + 1)) / this.columns;
    const down = (side - (this.rows ? HEAD_HEIGHT : 0) - gap * (lines + 1)) / lines;
    // Whole device pixels for each of the picture's; a picture larger than its place is made smaller instead.
    const exact = Math.min(across / this.width, down / this.height) * devicePixelRatio;
    const factor = (exact >= 1 ? Math.floor(exact) : exact) / devicePixelRatio;
    for (const { canvas } of this.tiles) {
      canvas.style.width = `${this.width * factor}px`;
      canvas.style.height = `${this.height * factor}px`;
    }
    this.grid.style.gap = `${gap}px`;
    this.grid.style.gridTemplateColumns = `${heads ? `${heads}px ` : ""}repeat(${this.columns}, max-content)`;
    this.element.dataset.factor = String(factor * devicePixelRatio);
  }

  #move(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns };
    const now = this.tiles.findIndex((tile) => tile.element === document.activeElement);
    const next = this.tiles[now + steps[event.key]];
    if (now < 0 || !next) return;
    event.preventDefault();
    event.stopPropagation();
    this.tiles[now].element.tabIndex = -1;
    next.element.tabIndex = 0;
    next.element.focus();
  }
}

/** Columns of a sheet of `count` pictures, as the server lays them out. */
export const squareColumns = (count) => Math.ceil(Math.sqrt(count));

function text(tag, content, className = "") {
  const element = document.createElement(tag);
  element.textContent = content;
  element.className = className;
  return element;
}

/** The pictures of a stage in one canvas, each pixel enlarged `scale` times. */
export function pictureOf(stage, scale) {
  const { columns, width, height } = stage;
  const rows = Math.ceil(stage.tiles.length / columns);
  const size = { width: columns * width * scale, height: rows * height * scale };
  const canvas = Object.assign(document.createElement("canvas"), size);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = false;
  stage.pictures.forEach((picture, index) => {
    const x = (index % columns) * width * scale;
    const y = Math.floor(index / columns) * height * scale;
    context.drawImage(picture, x, y, width * scale, height * scale);
  });
  return canvas;
}
