"use strict";
// What a curve is worth under the mouse.
for (const figure of document.querySelectorAll(".chart")) {
  const data = JSON.parse(figure.dataset.chart);
  const svg = figure.querySelector("svg");
  const cursor = document.createElementNS(svg.namespaceURI, "line");
  cursor.setAttribute("class", "cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  const leave = () => { cursor.remove(); tip.remove(); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    let at = 0;
    data.x.forEach((place, i) => { if (Math.abs(place - x) < Math.abs(data.x[at] - x)) at = i; });
    for (const [name, value] of [["x1", data.x[at]], ["x2", data.x[at]], ["y1", 10], ["y2", 206]])
      cursor.setAttribute(name, value);
    svg.append(cursor);
    tip.replaceChildren(`${data.samples_seen[at].toLocaleString("en")} samples`);
    for (const curve of data.curves) {
      const row = document.createElement("div");
      const value = curve.value[at];
      row.className = curve.color;
      row.textContent = `${curve.label} ${value === null ? "–" : Number(value.toPrecision(4)).toLocaleString("en", {maximumSignificantDigits: 4})}`;
      tip.append(row);
    }
    figure.append(tip);
    const frame = figure.getBoundingClientRect(), left = event.clientX - frame.left;
    const flips = left > figure.clientWidth / 2;
    tip.style.left = flips ? "" : `${left + 14}px`;
    tip.style.right = flips ? `${figure.clientWidth - left + 14}px` : "";
    tip.style.top = `${box.top - frame.top + 14}px`;
  });
}
// Samples through time: one frame at a time, by a slider.
for (const frames of document.querySelectorAll(".frames")) {
  const all = [...frames.querySelectorAll("figure")];
  if (all.length < 2) { frames.classList.add("played"); all.forEach(one => one.classList.add("shown")); continue; }
  const slider = Object.assign(document.createElement("input"), {type: "range", min: 0, max: all.length - 1, value: all.length - 1});
  slider.setAttribute("aria-label", "through time");
  const button = Object.assign(document.createElement("button"), {type: "button", textContent: "play"});
  const show = () => all.forEach((one, i) => one.classList.toggle("shown", i === Number(slider.value)));
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; button.textContent = "play"; };
  slider.addEventListener("input", () => { stop(); show(); });
  button.addEventListener("click", () => {
    if (timer !== null) { stop(); return; }
    if (Number(slider.value) === all.length - 1) slider.value = 0;
    button.textContent = "pause";
    show();
    timer = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (Number(slider.value) === all.length - 1) stop();
    }, 450);
  });
  const player = document.createElement("div");
  player.className = "player";
  player.append(button, slider);
  frames.classList.add("played");
  frames.prepend(player);
  show();
}
