"use strict";
try {
  const asked = localStorage.getItem("lenvm-theme");
  if (asked) document.documentElement.dataset.theme = asked;
} catch { /* no storage: the system's theme holds */ }
