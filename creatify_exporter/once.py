"""What `--once` and `--reasons` do: list every workspace once, and print."""

import structlog

from creatify_exporter.api import ApiError, Client
from creatify_exporter.config import Config
from creatify_exporter.ledger import Ledger
from creatify_exporter.reasons import Report
from creatify_exporter.service import Service, access, classifier
from creatify_exporter.tasks import TaskReader

_PATIENCE = 60.0  # seconds for the ledger, beyond those of a listing

_log = structlog.get_logger(__name__)


async def exposition(config: Config, ledger: Ledger, *, writes: bool) -> tuple[bytes, bool]:
    """List once; return the exposition, and whether every workspace could be listed."""
    service = Service(config, ledger, writes=writes)
    answer = await service.scrape(None, timeout=config.api.timeout + _PATIENCE, openmetrics=False)
    return answer, all(view.up for view in service.views())


def reasons(config: Config) -> tuple[str, bool]:
    """List once; return the table of the failure reasons, and whether every workspace could be listed."""
    classify = classifier(config)
    report, complete = Report(classify), True
    for one in config.workspaces:
        client = Client(**access(config, one), on_request=lambda _endpoint, _code: None)
        try:
            _add_failures(report, client, TaskReader(classify))
        except ApiError as error:
            complete = False
            _log.error("listing failed", workspace=one.name, cause=error.cause, status=error.status, error=str(error))
        finally:
            client.close()
    return report.render(), complete


def _add_failures(report: Report, client: Client, read: TaskReader) -> None:
    seen = set()
    for records in client.tasks():
        for record in records:
            for task in read([record]):
                if record and task.status == "failed" and task.id not in seen:
                    report.add(record.failed_reason)
                seen.add(task.id)
