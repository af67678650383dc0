// Curves of the basis that the sliders turn and cut, all of them computed beforehand, and what it
// captures in words.
const step = Math.round((turn.value - turns[0]) / (turns[1] - turns[0]));
const last = keep.value - 1;
const all = captured[step].map((_, i) => i + 1);
along_kept.data = { turn: all.map(() => turns[step]), kept: all, captured: captured[step], ceiling: ceiling[step] };
along_turn.data = {
  turn: turns,
  kept: turns.map(() => keep.value),
  captured: captured.map((row) => row[last]),
  ceiling: ceiling.map((row) => row[last]),
};
here.data = {
  turn: [turns[step]],
  kept: [keep.value],
  captured: [captured[step][last]],
  ceiling: [ceiling[step][last]],
};
by_turn.title.text = `any turn, ${keep.value} of ${all.length} directions`;
by_number.title.text = `turn ${turns[step].toFixed(3)}, any number of directions`;

const end = turns.findIndex((value) => Math.abs(value - 1) < 1e-9);
const digits = (x) => x.toFixed(3);
sentence.text =
  `Of ${all.length} directions the ${keep.value} with most residual energy are kept. They capture ` +
  `<b>${digits(captured[step][last])}</b> under a ceiling of <b>${digits(ceiling[step][last])}</b>. ` +
  `Rows capture ${digits(captured[0][last])} under ${digits(ceiling[0][last])}, ` +
  `rotated rows ${digits(captured[end][last])} under ${digits(ceiling[end][last])}.`;
