"""Pictures, films, curves, figures for print and the page of a run; drawn without torch."""

from plots.charts import draw_confusion, draw_roc
from plots.plotter import Plotter, draw_to
from plots.run import plot_epoch, plot_run

__all__ = ["Plotter", "draw_confusion", "draw_roc", "draw_to", "plot_epoch", "plot_run"]
