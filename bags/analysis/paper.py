"""The paper's tables and a table of later methods: the configuration of each row and its published numbers."""

import math
from dataclasses import dataclass

AP = ("AP", "AP1", "AP2", "AP3", "AP4", "APr", "APc", "APf")
MASK_AP = tuple(f"mask_{name}" for name in AP)
BINS = ("AP", "eAP", "AP1", "AP2", "AP3", "AP4")
ACC = ("ACC", "ACC1", "ACC2", "ACC3", "ACC4", "ACCbg")


@dataclass(frozen=True)
class Row:
    """A row of a table. config: the stem of a YAML file.

    published: percentages, in the order of the columns; NaN where none was published.
    """

    title: str
    config: str
    published: tuple[float, ...] = ()


@dataclass(frozen=True)
class PaperTable:
    """A table or figure.

    The column eAP is the mean of AP1 to AP4, and gain the AP of a row minus that of the row it starts from.

    source             the data of its published numbers
    data               how the names of datasets with this data begin
    published_columns  the columns of its published numbers, if they are not `columns`
    foreign            whether published numbers are also shown beside numbers of other datasets
    optional           whether rows without a configuration in the folder are left out
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    source: str = "published, LVIS v0.5"
    data: str = "lvis"
    published_columns: tuple[str, ...] = ()
    foreign: bool = False
    optional: bool = False

    def published(self, row: Row) -> dict[str, float]:
        """The published numbers of a row by column, in 0..1."""
        columns = self.published_columns or self.columns if row.published else ()
        numbers = zip(columns, row.published, strict=True)
        return {column: percentage / 100 for column, percentage in numbers if not math.isnan(percentage)}


def _rows(text: str) -> tuple[Row, ...]:
    """Rows from lines `title | config | published numbers`; an indented line continues the line above."""
    cells = [line.split("|") for line in text.strip().replace("\n    ", " ").splitlines()]
    return tuple(
        Row(title.strip(), config.strip(), tuple(map(float, " ".join(numbers).split())))
        for title, config, *numbers in cells
    )


BASELINE = "20.98 0.00 17.34 24.00 29.99 4.13 19.70 29.30"  # boxes of Faster R-CNN R50
BAGS = "25.96 11.33 27.64 25.14 29.90 17.65 25.75 29.54"
TABLE_1 = f"""
(1) softmax | softmax |
    {BASELINE} 92.78 0.00 2.47 25.30 45.87 95.91
(2) x2 | softmax_x2 |
    21.93 0.64 20.94 23.54 28.92 5.79 22.02 28.26 92.62 0.00 5.60 26.51 45.71 95.69
(3) finetune tail | finetune_tail |
    22.28 0.27 22.58 23.89 27.43 5.67 23.54 27.34 94.81 0.00 5.04 5.58 5.86 99.85
(4) RFS | rfs |
    23.41 7.80 24.18 23.14 28.33 14.59 22.74 27.77 92.71 0.60 7.50 25.62 44.39 95.84
(5) RFS-finetune | rfs_finetune |
    22.66 8.06 23.07 22.43 27.73 13.44 22.06 27.09 92.77 0.60 7.14 25.08 43.79 95.91
(6) re-weight | reweight |
    23.48 6.34 22.91 23.88 30.12 11.47 22.41 29.61 94.84 0.00 0.82 9.57 17.40 99.53
(7) re-weight-cls | reweight_cls |
    24.66 10.04 24.12 24.57 31.07 14.16 23.51 30.28 94.76 0.00 0.34 7.72 16.02 99.64
(8) focal loss | focal |
    11.12 0.00 10.24 13.36 13.17 2.74 11.13 14.46 3.87 0.00 17.45 40.11 49.31 1.35
(9) focal loss-cls | focal_cls |
    19.29 1.64 19.30 20.64 23.70 6.60 19.81 23.71 2.90 0.00 27.67 48.53 48.89 0.16
(10) NCM-fc | ncm_fc |
    16.02 5.87 14.13 16.97 21.40 10.31 13.92 20.92 94.29 0.00 0.02 0.23 0.15 100.00
(11) NCM-conv | ncm_conv |
    12.56 4.20 9.71 13.75 18.46 6.11 10.39 17.85 94.29 0.00 0.00 0.20 0.10 100.00
(12) tau-norm | tau_norm |
    11.01 0.00 11.71 12.01 12.36 2.07 12.30 12.97 5.91 0.00 30.32 39.49 49.14 3.42
(13) tau-norm-select | tau_norm_select |
    21.61 0.35 20.07 23.43 29.16 6.18 20.99 28.54 92.43 0.00 13.19 20.62 38.98 95.91
(14) BAGS | bags |
    {BAGS} 93.71 2.06 7.50 22.07 35.88 97.41
control: softmax-cls | softmax_retrained
"""
TABLE_2 = f"""
Faster R50 | softmax | {BASELINE}
Faster R50, BAGS | bags | {BAGS}
Faster X101 | large | 24.63 0.79 22.37 27.45 32.73 5.80 24.54 32.25
Faster X101, BAGS | large_bags | 27.83 14.99 28.07 27.93 32.02 18.78 27.32 32.07
Cascade X101 | cascade | 27.16 0.00 24.06 31.09 36.17 4.84 27.22 36.00
Cascade X101, BAGS | cascade_bags | 32.77 19.03 36.10 31.13 34.96 28.24 32.11 35.41
"""
TABLE_3 = """
(7) Mask R50 | mask |
    20.78 0.00 15.88 24.61 30.51 3.28 18.99 30.00 20.68 0.00 17.06 23.66 29.62 3.73 19.95 28.37
(8) BAGS | mask_bags |
    25.76 9.65 26.20 26.09 30.45 15.03 25.45 30.42 26.25 12.81 28.28 25.15 29.61 17.97 26.91 28.74
(9) HTC X101 | htc |
    31.28 5.02 31.71 33.24 37.21 12.39 32.58 37.18 29.28 5.11 30.34 30.62 34.37 12.11 31.32 33.58
(10) BAGS | htc_bags |
    33.68 19.95 36.14 32.82 36.06 25.43 34.12 36.42 31.20 17.33 33.87 30.34 33.29 23.40 32.34 32.89
(11) HTC X101-MS-DCN | htc_dcn |
    34.61 5.80 35.36 36.87 40.50 14.24 35.98 41.03 31.94 5.56 33.07 33.75 37.02 13.67 34.04 36.62
(12) BAGS | htc_dcn_bags |
    37.71 24.40 40.30 36.67 40.00 29.43 37.78 40.92 34.39 21.07 36.69 33.71 36.61 26.79 35.04 36.61
"""
TABLE_4 = f"""
(0) softmax | softmax | {BASELINE}
(1) -, -, N=4 | groups | 17.82 5.71 17.07 18.09 23.13 8.52 17.44 22.01
(2) b, -, N=4 | groups_background | 19.73 7.18 19.66 18.80 25.95 9.89 19.32 24.19
(3) -, o, N=4 | groups_others | 23.74 9.90 24.06 23.38 28.88 15.46 22.58 28.49
(4) b, o, N=2 | bags_2_groups | 25.31 6.53 27.55 24.19 30.35 15.30 25.14 29.53
(5) b, o, N=4 | bags | {BAGS}
(6) b, o, N=8 | bags_8_groups | 24.85 7.79 26.05 24.59 29.58 14.11 24.79 29.21
"""
FIGURE_4 = f"""
beta 0 | bags_beta_0
beta 1 | bags_beta_1
beta 2 | bags_beta_2
beta 4 | bags_beta_4
beta 8 | bags | {BAGS}
beta 16 | bags_beta_16
beta n | bags_beta_n
beta all | bags_beta_all
"""
# Section 5.5 gives gains only: mAP of BAGS minus that of its baseline, of boxes and of masks.
COCO_LT = """
Faster R50 | softmax
Faster R50, control | softmax_retrained
Faster R50, BAGS | bags | 2.2 nan
Mask R50 | mask
Mask R50, control | mask_retrained
Mask R50, BAGS | mask_bags | 2.4 2.3
"""
METHOD_ROWS = """
softmax | softmax | 16.1 0.0 12.0 27.4
NorCal | norcal
logit adjustment of the scores | logit_adjustment_scores
FRACAL | fracal
LogN | logit_normalisation
nearest neighbours | knn
softmax, retrained | softmax_retrained
softmax, class-balanced proposals | softmax_balanced
SimCal | simcal
BAGS | bags | 23.1 13.1 22.5 28.2
BAGS, cosine layer | bags_cosine
BAGS, Euclidean | bags_euclidean
DisAlign | disalign
IIF | iif
LDAM | ldam
LOCE | loce
logit adjustment (Balanced Softmax) | logit_adjustment
Seesaw | seesaw
ECM | ecm
sigmoid | sigmoid
FRACAL of the sigmoids | fracal_sigmoid
GOL | gumbel
BACL's loss | bacl
EQL | eql
EQL v2 | eql_v2
DropLoss | drop_loss
ACSL | acsl
federated | federated
class-balanced sigmoid | class_balanced
Balanced Softmax, sigmoid form | balanced_sigmoid
repeat factors, all trained | rfs | 22.2 11.5 21.2 28.0
EQL, all trained | eql_all | 18.6 2.1 17.4 27.2
EQL v2, all trained | eql_v2_all | 23.7 14.9 22.8 28.6
Seesaw, all trained | seesaw_all
"""

PAPER = {
    "1": PaperTable(
        "Table 1: methods transferred from long-tail classification, and BAGS",
        (*AP, *ACC),
        _rows(TABLE_1),
        optional=True,
    ),
    "2": PaperTable(
        "Table 2: a stronger backbone (ResNeXt-101-64x4d) and a stronger framework",
        AP,
        _rows(TABLE_2),
    ),
    "3": PaperTable(
        "Table 3: instance segmentation; boxes, then masks",
        (*AP, *MASK_AP),
        _rows(TABLE_3),
    ),
    "4": PaperTable(
        "Table 4: background group (b), others (o), number of groups N",
        AP,
        _rows(TABLE_4),
    ),
    "fig4": PaperTable(
        "Figure 4: sampling ratio beta (published as a drawing; only beta 8 has numbers)",
        AP,
        _rows(FIGURE_4),
    ),
    "coco_lt": PaperTable(
        "Section 5.5: COCO-LT; boxes, then masks; gain: mAP minus that of the row it starts from",
        (*BINS, "gain", *(f"mask_{name}" for name in BINS), "mask_gain"),
        _rows(COCO_LT),
        source="published, COCO-LT",
        data="coco_lt",
        published_columns=("gain", "mask_gain"),
    ),
}

# The published numbers are mask AP, APr, APc and APf of Mask R-CNN R50 after 12 epochs of LVIS v1, all from one code,
# that of EQL v2 (github.com/tztztztztz/eqlv2). Its EQL, EQL v2 and repeat factors train the whole detector, BAGS the
# classifier.
METHODS = PaperTable(
    "Classifiers of one detector: calibrated, or trained from its stored features; the last with the whole detector",
    (*AP, "AP50", "seconds"),
    _rows(METHOD_ROWS),
    source="published, LVIS v1, masks:",
    published_columns=("AP", "APr", "APc", "APf"),
    foreign=True,
    optional=True,
)
