"""The 42 subtypes of DeepTumorVQA v2, those of v1 among them, in their published spelling, and the type of answer of each."""

from __future__ import annotations

NUMBER = (
    "organ volume measurement",
    "organ HU measurement",
    "lesion volume measurement",
    "organ HU ratio",
    "tumor burden percentage",
    "largest lesion diameter",
    "largest lesion slice",
    "lesion counting",
    "lesion count by location",
    "organ aggregation",
    "tumor organ HU difference",
)
YES_NO = (
    "pancreatic lesion existence",
    "liver lesion existence",
    "kidney lesion existence",
    "kidney tumor existence",
    "kidney cyst existence",
    "colon lesion existence",
    "PDAC existence",
    "PNET existence",
    "lesion outlier",
    "organ enlargement",
    "pancreatic steatosis",
    "pancreatic cyst resectability",
    "pseudocyst determination",
    "splenomegaly detection",
    "portal hypertension assessment",
)
TEXT = (
    "liver lesion clustering",
    "kidney volume comparison",
    "largest lesion attenuation",
    "largest lesion location",
    "inter-segment comparison",
    "adjacent organ",
    "bilateral kidney asymmetry",
    "multi-organ lesion burden comparison",
    "fatty liver",
    "hepatic steatosis grading",
    "pancreatic tumor staging",
    "pancreatic lesion resectability",
    "PDAC vs PNET classification",
    "lesion type classification",
    "splenomegaly grading",
    "renal mass characterization",
)

SUBTYPES: dict[str, str] = {
    **dict.fromkeys(NUMBER, "number"),
    **dict.fromkeys(YES_NO, "yes-no"),
    **dict.fromkeys(TEXT, "text"),
}
