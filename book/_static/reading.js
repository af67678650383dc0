/* Previews, of which those of measured numbers can be had by keyboard and on touch too. */
"use strict";

(function () {
  /* One stop for the tab key in every section, arrow keys from one number to the next: a page has more of them than
     anyone wants to tab through. */
  function reachable(numbers) {
    let section = null;
    numbers.forEach((number, place) => {
      const own = number.closest("section");
      number.tabIndex = own === section ? -1 : 0;
      section = own;
      number.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        const next = step && numbers[place + step];
        if (next) {
          event.preventDefault();
          next.focus();
        }
      });
    });
  }

  function explain(numbers) {
    for (const number of numbers) {
      const origin = number.title;
      number.removeAttribute("title");
      tippy(number, { content: origin, theme: "book", maxWidth: 500, placement: "auto-start" });
    }
  }

  /* Names of records and of options break behind a sign, and not inside a word. */
  function breakable(words) {
    for (const word of words) word.innerHTML = word.innerHTML.replace(/(?<=[a-z\d])[._(=/](?=[a-z_"])/gi, "$&<wbr>");
  }

  /* Names that the theme gives twice, and a part of the page that it leaves without one. */
  function name() {
    document.querySelector("button.search-button-field")?.removeAttribute("aria-label");
    for (const icon of document.querySelectorAll("button.theme-switch-button .theme-switch")) {
      icon.querySelector("title")?.remove();
      for (const given of ["title", "aria-labelledby", "role"]) icon.removeAttribute(given);
      icon.setAttribute("aria-hidden", "true");
    }
    const title = document.querySelector(".bd-sidebar-primary .sidebar-primary-item:has(.logo)");
    title?.setAttribute("role", "region");
    title?.setAttribute("aria-label", "Book");
  }

  /* What every preview needs: a place inside the page's main part, a list around a term and its meaning, no id for a
     second time, and formulae once it has a size. */
  const previews = {
    appendTo: () => document.querySelector("article.bd-article") ?? document.body,
    onCreate: ({ popper }) => {
      const box = popper.querySelector(".tippy-content");
      for (const part of box.querySelectorAll("[id]")) part.removeAttribute("id");
      if (box.querySelector(":scope > dt")) {
        const list = document.createElement("dl");
        list.append(...box.childNodes);
        box.append(list);
      }
    },
    onMount: ({ popper, popperInstance }) =>
      window.MathJax?.typesetPromise?.([popper]).then(() => popperInstance?.forceUpdate()),
  };

  /* A figure that scrolls, as on a phone, does so by keyboard too; the theme sees to tables and code. */
  function scrollable() {
    for (const figure of document.querySelectorAll("div.cell_output figure")) {
      if (figure.scrollWidth > figure.clientWidth) figure.tabIndex = 0;
      else figure.removeAttribute("tabindex");
    }
  }

  /* The key Escape closes a preview that hides what the reader wants to see. */
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && window.tippy) window.tippy.hideAll();
  });
  name();
  window.addEventListener("resize", scrollable);
  window.addEventListener("load", scrollable);
  window.addEventListener("load", name); // icons may have been drawn anew
  document.addEventListener("DOMContentLoaded", () => {
    breakable(document.querySelectorAll(".bd-article code.literal .pre"));
    const numbers = [...document.querySelectorAll("abbr.record[title]")];
    reachable(numbers);
    if (typeof tippy !== "undefined") {
      tippy.setDefaultProps(previews);
      explain(numbers); // without it the title still says it on hover
    }
    for (const link of document.querySelectorAll("a.btn-download-source-button")) link.download = "";
  });
})();
