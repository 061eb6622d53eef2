"use strict";
// A cursor over a picture follows its sound; a click on the picture moves the sound to that time.
for (const figure of document.querySelectorAll("figure[data-time]")) {
  const sound = figure.querySelector("audio"), stage = figure.querySelector(".stage");
  if (!sound || !stage) continue;
  const lines = JSON.parse(figure.dataset.time).map((axis) => {
    const line = document.createElement("div");
    line.className = "cursor";
    line.style.top = 100 * axis.top + "%";
    line.style.height = 100 * (axis.bottom - axis.top) + "%";
    stage.append(line);
    return [axis, line];
  });
  const place = () => {
    for (const [axis, line] of lines) {
      const share = (sound.currentTime - axis.start) / (axis.end - axis.start);
      line.hidden = share < 0 || share > 1;
      line.style.left = 100 * (axis.left + share * (axis.right - axis.left)) + "%";
    }
  };
  const follow = () => { place(); if (!sound.paused) requestAnimationFrame(follow); };
  sound.addEventListener("play", follow);
  sound.addEventListener("seeked", place);
  stage.addEventListener("click", (event) => {
    const box = stage.getBoundingClientRect(), axis = lines[0][0];
    const share = ((event.clientX - box.left) / box.width - axis.left) / (axis.right - axis.left);
    if (share >= 0 && share <= 1) sound.currentTime = axis.start + share * (axis.end - axis.start);
  });
  place();
}
addEventListener("beforeprint", () => { for (const one of document.querySelectorAll("details")) one.open = true; });
