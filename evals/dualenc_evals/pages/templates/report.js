"use strict";
// A cursor line and the values under it, for every chart that carries its numbers.
const tip = document.getElementById("tip");
for (const svg of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(svg.dataset.series);
  const [left, , width] = data.frame;
  const [low, high] = data.x;
  const scale = data.log ? Math.log10 : (v) => v;
  const span = scale(high) - scale(low) || 1;
  const cursor = svg.querySelector(".cursor");
  const position = (x) => left + ((scale(x) - scale(low)) / span) * width;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const rows = [];
    let near = null;
    for (const s of data.series) {
      let best = 0;
      s.x.forEach((x, i) => { if (Math.abs(position(x) - at) < Math.abs(position(s.x[best]) - at)) best = i; });
      if (near === null) near = s.x[best];
      if (s.x.length > 2 || !rows.length) rows.push([s, s.t[best]]);
    }
    cursor.setAttribute("x1", position(near));
    cursor.setAttribute("x2", position(near));
    svg.classList.add("live");
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = near.toLocaleString("en");
    tip.append(head);
    for (const [s, text] of rows) {
      const line = document.createElement("div");
      const key = document.createElement("i");
      key.className = "c" + s.c;
      line.append(key, `${s.name} `, Object.assign(document.createElement("b"), { textContent: text }));
      tip.append(line);
    }
    tip.hidden = false;
    tip.style.left = Math.min(event.pageX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = event.pageY + 14 + "px";
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; svg.classList.remove("live"); });
}

// Play one clip at a time.
for (const button of document.querySelectorAll(".play")) {
  const audio = button.querySelector("audio");
  button.addEventListener("click", () => {
    const wasPlaying = !audio.paused;
    for (const other of document.querySelectorAll(".play audio")) other.pause();
    if (!wasPlaying) { audio.currentTime = 0; audio.play(); }
  });
  audio.addEventListener("play", () => button.classList.add("on"));
  for (const end of ["pause", "ended"]) audio.addEventListener(end, () => button.classList.remove("on"));
}
