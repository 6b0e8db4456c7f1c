"""What is wrong with a config or a checkpoint, as findings with stable codes. Importing this needs no torch."""

from compressed_format.checking.consumers import CONSUMERS, consumer_findings
from compressed_format.checking.findings import Code, Finding, Report, Severity
from compressed_format.checking.paths import check
from compressed_format.checking.plan import LayerShape
from compressed_format.checking.table import CODES

__all__ = ["CODES", "CONSUMERS", "Code", "Finding", "LayerShape", "Report", "Severity", "check", "consumer_findings"]
