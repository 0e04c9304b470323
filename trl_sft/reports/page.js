// Replaces each chart of the page by an interactive one. Without scripts the page keeps the charts as SVG.
"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("chart-data").textContent);
  const holders = [...document.querySelectorAll("[data-chart]")];
  const drawn = [];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function drawMarks(marks) {
    return (plot) => {
      const context = plot.ctx;
      context.save();
      context.strokeStyle = color("--warn");
      context.setLineDash([6, 4]);
      for (const mark of marks) {
        const x = plot.valToPos(mark.step, "x", true);
        context.beginPath();
        context.moveTo(x, plot.bbox.top);
        context.lineTo(x, plot.bbox.top + plot.bbox.height);
        context.stroke();
      }
      context.restore();
    };
  }

  function draw() {
    drawn.splice(0).forEach((plot) => plot.destroy());
    holders.forEach((holder) => {
      const chart = charts[Number(holder.dataset.chart)];
      const line = {stroke: color("--line"), width: 1};
      const axis = {stroke: color("--soft"), grid: line, ticks: line};
      const options = {
        width: holder.clientWidth,
        height: 260,
        scales: {x: {time: false}},
        axes: [axis, {...axis, size: 64, values: (plot, ticks) => ticks.map((tick) => String(Number(tick.toPrecision(4))))}],
        series: [{label: chart.axis[document.getElementById("chinese").checked ? 1 : 0]}, ...chart.names.map((name, number) => ({
          label: name,
          stroke: color("--c" + number % 8),
          width: 2,
          spanGaps: true,
          points: {show: chart.data[0].length <= 40},
        }))],
        hooks: {draw: [drawMarks(chart.marks)]},
      };
      holder.replaceChildren();
      drawn.push(new uPlot(options, chart.data, holder));
    });
  }

  document.querySelectorAll(".names").forEach((names) => names.remove());  // the interactive legend has them
  draw();
  document.querySelectorAll("input[name=language]").forEach((input) => input.addEventListener("change", draw));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) {
      width = innerWidth;
      draw();
    }
  });
})();
