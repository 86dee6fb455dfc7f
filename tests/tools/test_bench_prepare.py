"""`tools.bench prepare`: both jobs give the same rows."""

from tools.bench import prepare

ROWS = 3000


def test_the_preparation_and_the_job_by_hand_give_the_same_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "CHUNK", 1000)
    table = tmp_path / "table.parquet"
    prepare.generate(table, ROWS)
    made = {job: prepare.work(job, table, tmp_path / job) for job in prepare.JOBS}
    assert made["lepton"]["sums"] == made["hand"]["sums"]
    assert 0 < made["hand"]["out_rows"] < ROWS
