// Draws a figure to play with in the element of this id: in the book in the place of the static
// figure that follows, in a notebook where it stands.
async function play(id, item) {
  if (document.readyState === "loading") {
    await new Promise((resolve) => addEventListener("DOMContentLoaded", resolve));
  }
  const place = document.getElementById(id);
  place.hidden = false;
  if (!window.Bokeh) {
    place.textContent = "The figure that follows can be played with in the book. To do so here, run " +
      "bokeh.io.output_notebook(bokeh.resources.INLINE) and then this cell again.";
    return;
  }
  const follows = (figure) => place.compareDocumentPosition(figure) & Node.DOCUMENT_POSITION_FOLLOWING;
  const figure = [...document.querySelectorAll("figure")].find(follows);
  if (figure) {
    place.setAttribute("role", "group");
    place.setAttribute("aria-label", figure.querySelector("img").alt);
    figure.prepend(place);
  }
  const views = await Bokeh.embed.embed_item(item, id);
  figure?.classList.add("played"); // hides the static one, see book.css
  nameHandles(place);

  // Letters, axes and borders take the colour of the page's text, and follow it.
  const names = ["axis_label_text_color", "major_label_text_color", "axis_line_color", "text_color",
    "major_tick_line_color", "minor_tick_line_color", "outline_line_color", "label_text_color"];
  const recolour = () => {
    const ink = getComputedStyle(place).color;
    for (const model of views.roots[0].model.document.all_models) {
      for (const name of names) if (name in model.properties) model[name] = ink;
    }
  };
  recolour();
  new MutationObserver(recolour).observe(document.documentElement, { attributeFilter: ["data-theme"] });
}

// Gives every handle of a slider the slider's name, for those who hear the page; of two, which end it is.
function nameHandles(root) {
  const title = root.querySelector(".bk-slider-title")?.textContent.replace(/:[^:]*$/, "");
  const handles = root.querySelectorAll(".noUi-handle");
  const ends = handles.length > 1 ? [", lower end", ", upper end"] : [""];
  handles.forEach((handle, place) => handle.setAttribute("aria-label", title + ends[place]));
  for (const part of root.querySelectorAll("*")) if (part.shadowRoot) nameHandles(part.shadowRoot);
}
