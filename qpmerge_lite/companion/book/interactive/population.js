// The merges that are asked for, and how well their energy orders them by accuracy.
const { data } = merges;
const energies = Array.from(data[energy.value]);
const accuracies = Array.from(data.accuracy);
const places = energies.map((_, i) => i);

const chosen = Object.entries(choices).filter(([_, select]) => select.value !== every);
const [low, high] = between.value;
const fits = (i) =>
  !Number.isNaN(energies[i]) &&
  (energies[i] >= low || low === between.start) &&
  (energies[i] <= high || high === between.end) &&
  chosen.every(([column, select]) => data[column][i] === select.value);
wanted.booleans = places.map(fits);
data.energy = energies.map((value) => Math.max(value, lowest));
merges.change.emit();
const lowest_accuracy = Math.min(...accuracies.filter((_, i) => wanted.booleans[i]));
for (const [name, cloud] of Object.entries(clouds)) {
  cloud.visible = [every, name].includes(choices.suite.value);
  cloud.below[0].axis_label = energy.value.replace(".", ", ").replaceAll("_", " ");
  Object.assign(cloud.x_range, { start: low - 0.05, end: high + 0.02 });
  if (lowest_accuracy < 1) cloud.y_range.start = lowest_accuracy - 0.02;
}

// Spearman's ρ: Pearson's r of the ranks, of which ties share their mean; 0 where one does not vary.
const ranks = (values) =>
  values.map((value) => {
    const below = values.filter((other) => other < value).length;
    const ties = values.filter((other) => other === value).length;
    return below + (ties + 1) / 2;
  });
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const pearson = (x, y) => {
  const [a, b] = [x, y].map((values) => values.map((value) => value - mean(values)));
  const product = (u, v) => u.reduce((sum, value, i) => sum + value * v[i], 0);
  const scale = Math.sqrt(product(a, a) * product(b, b));
  return scale > 0 ? product(a, b) / scale : 0;
};
const spearman = (rows) =>
  pearson(ranks(rows.map((i) => energies[i])), ranks(rows.map((i) => accuracies[i])));

// Within every problem of at least so many merges, averaged; and over all of them.
const fewest = 3;
const brushed = new Set(merges.selected.indices);
const left = places.filter((i) => wanted.booleans[i] && (brushed.size === 0 || brushed.has(i)));
const digits = (x) => (Number.isFinite(x) ? x.toFixed(2) : "—");
const lines = Object.keys(clouds).map((name) => {
  const rows = left.filter((i) => data.suite[i] === name);
  const names = [...new Set(rows.map((i) => data.problem[i]))];
  const problems = names.map((problem) => rows.filter((i) => data.problem[i] === problem));
  const large = problems.filter((problem) => problem.length >= fewest);
  const overall = rows.length >= fewest ? spearman(rows) : NaN;
  return [name, rows.length, large.length, digits(mean(large.map(spearman))), digits(overall)];
});
const heads = ["", "merges", "problems", "ρ within", "ρ over all"];
const line = (texts, tag) => `<tr>${texts.map((text) => `<${tag}>${text}</${tag}>`).join("")}</tr>`;
table.text = `<table>${line(heads, "th")}${lines.map((texts) => line(texts, "td")).join("")}</table>`;
