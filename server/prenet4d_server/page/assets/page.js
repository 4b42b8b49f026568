"use strict";
// Says when this page has lost its server, and loads it anew once the server is there again; keeps
// how this browser's user likes to see patterns.
(() => {
  const SILENCE_MS = 15000;
  const AGAIN_MS = 1000;
  let heard = Date.now();
  let lost = false;

  async function tryAgain() {
    try {
      await fetch("healthz", { cache: "no-store" }); // any answer will do: the server is there
      location.reload();
    } catch {
      setTimeout(tryAgain, AGAIN_MS);
    }
  }

  function lose() {
    if (lost) return;
    lost = true;
    const since = new Date(heard).toLocaleTimeString("en-GB");
    const line = document.getElementById("lost");
    line.textContent =
      `This page has heard nothing from its server since ${since}: what is shown is old. Trying again.`;
    line.hidden = false;
    document.body.classList.add("lost");
    setTimeout(tryAgain, AGAIN_MS);
  }

  const KEPT = "prenet4d-display";
  const SENSE = {
    active: (model, value) => Number.isInteger(value) && value in model.labels,
    value: (model, value) =>
      model.options ? model.options.includes(value)
      : Array.isArray(value) && value.length === 2 && value[0] <= value[1] &&
        value.every((end) => end >= model.start && end <= model.end),
  };

  // controls: name → a Bokeh widget and the property that holds what was chosen.
  function remember(controls) {
    document.getElementById("loading").hidden = true; // this is called once all is there
    let kept = {};
    try {
      kept = JSON.parse(localStorage.getItem(KEPT)) ?? {};
    } catch {} // somebody else's, or storage is switched off
    for (const [name, [model, property]] of Object.entries(controls)) {
      if (SENSE[property](model, kept[name])) model[property] = kept[name];
      model.properties[property].change.connect(() => {
        kept[name] = model[property];
        try {
          localStorage.setItem(KEPT, JSON.stringify(kept));
        } catch {} // then it lasts until the page is closed
      });
    }
  }

  window.prenet4d = { beat() { heard = Date.now(); }, lose, remember };
  setInterval(() => { if (Date.now() - heard > SILENCE_MS) lose(); }, AGAIN_MS);
})();
