// What the merge at the two coefficients of the sliders captures, its gap to the optimum, and its
// place among the methods.
const d = [first.value, second.value];
merge.data = { d1: [d[0]], d2: [d[1]] };

// L(d) = ½ dᵀHd + fᵀd + E
const times = (x, y) =>
  x[0] * (H[0][0] * y[0] + H[0][1] * y[1]) + x[1] * (H[1][0] * y[0] + H[1][1] * y[1]);
const loss = (x) => times(x, x) / 2 + f[0] * x[0] + f[1] * x[1] + energy;
const captured = (x) => 1 - loss(x) / energy;

// L(d) - L(d*) = ½ (d - d*)ᵀH(d - d*), the certificate
const gap = (x) => {
  const step = [x[0] - optimum[0], x[1] - optimum[1]];
  return times(step, step) / 2 / energy;
};

// the node of the grid of accuracies that is nearest on one axis
const node = (x) => {
  const distances = nodes.map((value) => Math.abs(value - x));
  return distances.indexOf(Math.min(...distances));
};

const { name, letter, colour, d1, d2 } = methods.data;
const rows = Array.from(name, (_, i) => ({
  d: [d1[i], d2[i]],
  words: `<span style="color: ${colour[i]}" aria-hidden="true">${letter[i]}</span> ${name[i]}`,
  accuracy: accuracies[i],
}));
const place = rows.findIndex((row) => row.d[0] === d[0] && row.d[1] === d[1]);
jump.value = place < 0 ? elsewhere : name[place];

const mine = { d, words: "<b>◯ your merge</b>", accuracy: accuracy[node(d[1])][node(d[0])], near: true };
const ordered = [mine, ...rows].sort((a, b) => captured(b.d) - captured(a.d));
const digits = (x) => x.toFixed(3);
const cells = (row) => [
  row.words, digits(captured(row.d)), digits(gap(row.d)),
  row.accuracy == null ? "—" : (row.near ? "≈ " : "") + digits(row.accuracy),
];
const heads = ["", "captured", "gap", "accuracy"];
const line = (texts, tag) => `<tr>${texts.map((text) => `<${tag}>${text}</${tag}>`).join("")}</tr>`;
table.text = `<table><caption>≈ at the nearest node of the map of accuracies</caption>${line(heads, "th")}${ordered.map((row) => line(cells(row), "td")).join("")}</table>`;
sentence.text =
  `Your merge captures <b>${digits(captured(d))}</b> of the residual energy; its certificate says that ` +
  `<b>${digits(gap(d))}</b> is missing to the optimum. Together that is ${digits(captured(d) + gap(d))}, ` +
  `wherever it lies.`;
