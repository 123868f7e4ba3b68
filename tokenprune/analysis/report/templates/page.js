"use strict";
// One slider for all pictures: it shows the frames of one stage and hides those of the others.
(() => {
  const slider = document.getElementById("stage");
  if (!slider) return;
  const labels = JSON.parse(slider.dataset.labels);
  const said = document.getElementById("stage-name");
  const frames = document.querySelectorAll(".frame");
  const turn = () => {
    for (const frame of frames) frame.hidden = frame.dataset.stage !== slider.value;
    said.textContent = labels[slider.value];
    slider.setAttribute("aria-valuetext", labels[slider.value]);
  };
  document.getElementById("slider").hidden = false;
  slider.addEventListener("input", turn);
  turn();
})();
