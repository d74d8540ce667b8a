// What a search finds, in order: pages for one task before tutorials and the rest, tables of benchmarks last, as they have the same names
// in their titles.
var FOLDERS = [["start", 5], ["howto/", 5], ["tutorials/", 2], ["benchmark_results/", -30]];

var Scorer = {
  score: ([docname, title, anchor, descr, score]) =>
    FOLDERS.reduce((sum, [folder, more]) => sum + (docname.startsWith(folder) ? more : 0), score),

  // what Sphinx has
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
