// Filters the list of documents by what is typed and chosen above it.
"use strict";
(() => {
  for (const block of document.querySelectorAll(".documents")) {
    const form = block.querySelector("form");
    const search = form.querySelector("input");
    const choices = [...form.querySelectorAll("select")];
    const count = form.querySelector("output");
    const items = [...block.querySelectorAll(".document-list > li")].map((element) => ({
      element, words: element.textContent.toLowerCase(),
    }));
    // Every word has to be somewhere in the document, its source or its numbers.
    const show = () => {
      const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      for (const { element, words: text } of items) {
        const chosen = choices.every((choice) => !choice.value || element.dataset[choice.dataset.filter] === choice.value);
        element.hidden = !chosen || !words.every((word) => text.includes(word));
        shown += !element.hidden;
      }
      count.textContent = `${shown} of ${items.length} documents`;
    };
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", show);
    show();
  }
})();
