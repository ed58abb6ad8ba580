package main

import (
	"fmt"
	"os"
	"time"

	"distkit/cmd/internal/cli"
	"distkit/cmd/internal/progress"
	"distkit/content"
	"distkit/image"

	"github.com/dustin/go-humanize"
)

// report prints and counts what a sweep deletes.
type report struct {
	failed  cli.Tally
	records *cli.Records
	dryRun  *bool
	step    *progress.Step
	sums
}

// sums are the totals of a sweep: deleted, or with --dry-run to be deleted, and left.
type sums struct {
	Blobs     int64      `json:"blobs"`
	Snapshots int64      `json:"snapshots"`
	Leftovers int64      `json:"leftovers"`
	Size      int64      `json:"size"` // bytes in total
	Kept      image.Kept `json:"kept"`
}

// add adds what was deleted to the sum and to the progress.
func (r *report) add(size int64) {
	r.Size += size
	r.step.Add(size)
	r.step.Count()
}

func (r *report) blob(b content.Info) error {
	r.Blobs++
	r.add(b.Size)
	record := struct {
		Digest   string    `json:"digest"`
		Size     int64     `json:"size"`
		StoredAt time.Time `json:"storedAt"`
	}{string(b.Digest), b.Size, b.CreatedAt}
	return r.records.Write(record, b.Digest, cli.Size(b.Size), b.CreatedAt, "blob")
}

func (r *report) snapshot(driver, key string, size int64, updated time.Time) error {
	r.Snapshots++
	r.add(size)
	record := struct {
		Snapshot    string    `json:"snapshot"`
		Snapshotter string    `json:"snapshotter"`
		Size        int64     `json:"size"`
		StoredAt    time.Time `json:"storedAt"`
	}{key, driver, size, updated}
	return r.records.Write(record, key, cli.Size(size), updated, driver)
}

func (r *report) leftover(l content.Leftover) error {
	r.Leftovers++
	r.add(l.Size)
	record := struct {
		Ingest   string    `json:"ingest,omitempty"`
		Path     string    `json:"path"`
		Size     int64     `json:"size"`
		StoredAt time.Time `json:"storedAt"`
	}{l.Ref, l.Path, l.Size, l.ChangedAt}
	if l.Ref == "" {
		return r.records.Write(record, l.Path, cli.Size(l.Size), l.ChangedAt, "torn")
	}
	return r.records.Write(record, l.Ref, cli.Size(l.Size), l.ChangedAt, "ingest")
}

func (r *report) reason(why image.Reason) error {
	name := why.Name
	if why.StoredAt != nil {
		name = why.StoredAt.UTC().Format(time.RFC3339)
	}
	return r.records.Write(why, why.Reason, why.Namespace, name, string(why.Target))
}

// goOn reports an error about one document or snapshot.
func (r *report) goOn(err error) { _ = r.failed.Add(err) }

// close ends the report: with a record of the totals, and with a line of them on standard error, as requested.
func (r *report) close(record, line bool) error {
	if record {
		all := struct {
			Total sums `json:"total"`
		}{r.sums}
		if err := r.records.Write(all, "total", cli.Size(r.Size), time.Time{}, fmt.Sprint(r.Blobs+r.Snapshots+r.Leftovers)); err != nil {
			return err
		}
	}
	if err := r.records.Close(); err != nil {
		return err
	}
	if line {
		verb := "deleted"
		if *r.dryRun {
			verb = "would delete"
		}
		fmt.Fprintf(os.Stderr, "dist-gc: %s %s, %s and %s, %s; %s (%s) stay\n", verb, count(r.Blobs, "blob"), count(r.Snapshots, "snapshot"),
			count(r.Leftovers, "leftover"), size(r.Size), count(r.Kept.Blobs, "blob"), size(r.Kept.Size))
	}
	return r.failed.End()
}

func count(n int64, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

func size(n int64) string { return humanize.IBytes(uint64(n)) }
