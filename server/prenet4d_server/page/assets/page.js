"use strict";
// Says when this page has lost its server, and loads it anew once the server is there again.
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
    const since = new Date(heard).toLocaleTimeString();
    const line = document.getElementById("lost");
    line.textContent = `This page has heard nothing from its server since ${since}; trying again.`;
    line.hidden = false;
    setTimeout(tryAgain, AGAIN_MS);
  }

  window.prenet4d = { beat() { heard = Date.now(); }, lose };
  setInterval(() => { if (Date.now() - heard > SILENCE_MS) lose(); }, AGAIN_MS);
})();
