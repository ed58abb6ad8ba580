package image

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"distkit/content"
	"distkit/disk"
	"distkit/disk/layout"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Sweep deletes the blobs that nothing needs, if they were stored, or found stored by an ingest, before a given time.
// Needed is what names of all namespaces, containers and blobs with the label [LabelRoot] reach. Entries of an
// index.json without a name, as other tools write them, count as names. Entries of referrers ([layout.Entry.DependsOn])
// don't: referrers are needed by their subjects, and their entries are removed when nothing needs these.
//
// What a document refers to is decided by its bytes, whatever media types descriptors have. A blob that is missing,
// isn't a document, or has a digest of an unknown algorithm refers to nothing. A corrupt document counts as referring
// to every digest in its bytes, and the sweep continues. If names or documents can't be read at all, nothing more is
// deleted.
//
// A sweep makes nobody wait for longer than a moment. It reads names, documents and blobs without a lock (marking), and
// deletes in short phases, each under an exclusive lock on the store's hold and the locks of all names. The invariant
// is that at every deletion
//
//   - no process holds the store, can create, move or remove a name, or can record a container;
//   - everything that names, containers and labels reach is marked. So each phase first checks whether an index.json
//     was replaced since its names were marked, and whether the store was held since containers and labels were read.
//     If so the phase ends at once, the sweep marks what is new, and starts another phase;
//   - the blob isn't marked, and, under its own lock, is older than both the given time and the sweep itself.
//
// Marks are only added. A document's bytes never change, so what was marked because of it stays right. A blob stored
// during the sweep is younger than the sweep. If it is a document that was missing, what it refers to is marked before
// the next deletion, provided that the process that stored it held the store.
type Sweep struct {
	Store  *content.Store
	Before time.Time
	DryRun bool          // only report: delete nothing, and take no lock
	Wait   time.Duration // total time to wait for holders of the store; Unavailable after that
	Only   digest.Digest // delete no other blob; "" means all
	// Snapshots, if set, is called before blobs are deleted. It may delete unneeded snapshots, in functions that it
	// passes to alone, each of which is called in a phase.
	Snapshots func(ctx context.Context, alone func(func(Needed) error) error) error
	// Leftovers, if set, is called for each leftover of a process that died, after it is deleted (or would be).
	Leftovers func(content.Leftover) error
	// Damaged, if set, is called with an error for each corrupt document.
	Damaged func(error)
}

// Needed has what named images and containers need of the snapshots.
type Needed struct {
	Chains    Set // chain IDs in all stored configs
	Snapshots map[Snapshot]bool
}

// Snapshot identifies a snapshot. Namespace is "" for one that all namespaces share.
type Snapshot struct{ Driver, Namespace, Key string }

// LabelRoot is the label of a blob that a sweep keeps, with everything it refers to, as if it had a name. Its value has
// no meaning. containerd's garbage collection uses it too.
const LabelRoot = "containerd.io/gc.root"

const (
	// phaseTime bounds the time of a phase, and phaseBlobs the blobs that it deletes. A phase is so short that it
	// mostly ends within the process's time slice, so nobody waits longer because the scheduler paused it. batch is the
	// number of blobs that are examined before a phase.
	phaseTime  = 4 * time.Millisecond
	phaseBlobs = 64
	batch      = 2048
	// freeMarks is how often names may be marked again before the time counts as waiting.
	freeMarks = 16
	// large is the blob size in bytes from which freeing the blocks takes long. While a file is open, unlinking it is
	// quick.
	large = 16 << 20
	// maxMissing bounds the digests that are remembered because documents refer to them but they aren't stored.
	maxMissing = 1 << 20
)

// Run performs the sweep. It calls f with each blob after its deletion (or that would be deleted), and counts those
// that stay. If the store's directory doesn't exist there is nothing to do, and it is not created.
func (s Sweep) Run(ctx context.Context, f func(content.Info) error) (kept Kept, err error) {
	if _, err := os.Stat(s.Store.Root()); errors.Is(err, fs.ErrNotExist) {
		return kept, nil
	}
	if !s.DryRun {
		if err := s.Store.CheckSweep(ctx); err != nil {
			return kept, err
		}
	}
	w := newSweeper(s)
	defer w.close()
	if w.Before.After(w.started) {
		w.Before = w.started
	}
	if err := w.mark(ctx); err != nil {
		return kept, err
	}
	if s.Snapshots != nil {
		err := s.Snapshots(ctx, func(f func(Needed) error) error {
			return w.alone(ctx, func() error { return f(Needed{w.chains, w.snapshots}) })
		})
		if err != nil {
			return kept, err
		}
	}
	if !s.DryRun && s.Only == "" {
		if err := w.dropReferrers(ctx); err != nil {
			return kept, err
		}
	}
	if err := w.blobs(ctx, &kept, f); err != nil {
		return kept, err
	}
	if s.Leftovers != nil {
		err = w.leftovers(ctx)
	}
	return kept, err
}

// Kept counts the blobs that a sweep keeps.
type Kept struct {
	Blobs int64 `json:"blobs"`
	Size  int64 `json:"size"` // bytes
}

// Set is a set of digests. It considers digests equal if they end in the same 128 bits. A collision could only keep a
// blob.
type Set map[[16]byte]struct{}

func keyOf(d digest.Digest) (key [16]byte) {
	alg, text, _ := strings.Cut(string(d), ":")
	if alg == string(digest.SHA256) && len(text) == 2*sha256.Size {
		if _, err := hex.Decode(key[:], []byte(text[len(text)-2*len(key):])); err == nil {
			return key
		}
	}
	sum := sha256.Sum256([]byte(d))
	return [16]byte(sum[:])
}

// Has reports whether a digest is in the set.
func (s Set) Has(d digest.Digest) bool { _, ok := s[keyOf(d)]; return ok }

// add adds a digest, and reports whether it is new.
func (s Set) add(d digest.Digest) bool {
	k := keyOf(d)
	if _, ok := s[k]; ok {
		return false
	}
	s[k] = struct{}{}
	return true
}

// dropReferrers removes the entries of referrers whose subjects are not marked, before their blobs are deleted.
func (s *sweeper) dropReferrers(ctx context.Context) error {
	for _, namespace := range slices.Collect(maps.Keys(s.names)) {
		if m := s.names[namespace]; m == nil || !slices.ContainsFunc(m.referrers, s.dropped) {
			continue
		}
		err := s.alone(ctx, func() error { return s.dropFrom(ctx, s.names[namespace]) })
		if err != nil {
			return err
		}
	}
	return nil
}

// dropFrom is dropReferrers for one namespace, in a phase. A process that locked these names first may be waiting for
// those of another namespace, which this phase holds. So dropFrom gives up soon, or if the names have changed, and
// leaves the entries to the next sweep.
func (s *sweeper) dropFrom(ctx context.Context, m *markedNames) error {
	if m == nil {
		return nil
	}
	disk.Unlock(m.file)
	short, cancel := context.WithTimeout(ctx, phaseTime)
	defer cancel()
	err := m.dir.Change(short, func() error { return nil }, func(ix *layout.Index) error {
		if !m.current() {
			return errUnchanged
		}
		ix.Entries = slices.DeleteFunc(ix.Entries, func(e layout.Entry) bool {
			d, ok := reference(e.Raw)
			subject := e.DependsOn()
			return ok && subject != "" && s.dropped(referrer{d.Digest, subject})
		})
		return nil
	})
	if errors.Is(err, errUnchanged) || ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}

// dropped reports whether nothing needs a referrer or its subject, and the referrer's blob is old enough to be deleted
// or missing.
func (s *sweeper) dropped(r referrer) bool {
	if s.marked.Has(r.digest) || s.marked.Has(r.subject) {
		return false
	}
	fi, err := s.Store.Tree.Stat(layout.BlobName(r.digest))
	return errors.Is(err, fs.ErrNotExist) || err == nil && fi.ModTime().Before(s.Before)
}

// blobs deletes the blobs that are not marked, some in each phase, and calls f with them after the phase.
func (s *sweeper) blobs(ctx context.Context, kept *Kept, f func(content.Info) error) error {
	keep := func(info content.Info) {
		kept.Blobs++
		kept.Size += info.Size
	}
	candidates := make([]content.Info, 0, batch)
	sweep := func() error {
		defer func() { candidates = candidates[:0] }()
		// Blobs that share a lock come one after another.
		slices.SortFunc(candidates, func(a, b content.Info) int {
			return cmp.Compare(layout.LockName(a.Digest), layout.LockName(b.Digest))
		})
		for rest := candidates; len(rest) > 0; {
			var gone, stay []content.Info
			err := s.alone(ctx, func() (err error) {
				gone, stay, err = s.phase(ctx, &rest)
				return err
			})
			if len(gone) > 0 && !s.DryRun {
				e := events.Event{Topic: "/content/sweep", Count: len(gone)}
				for _, info := range gone {
					e.Size += info.Size
				}
				events.Append(s.Store.Root(), e)
			}
			for _, info := range stay {
				keep(info)
			}
			for _, info := range gone {
				if ferr := f(info); ferr != nil {
					return cmp.Or(err, ferr)
				}
			}
			if err != nil {
				return err
			}
		}
		return nil
	}
	future := s.started.Add(time.Hour)
	each := s.Store.WalkSizes
	if s.Only != "" {
		each = func(ctx context.Context, f func(content.Info) error) error {
			info, err := s.Store.Info(ctx, s.Only)
			if err != nil && !errdefs.IsDataLoss(err) { // about its labels
				return err
			}
			return f(info)
		}
	}
	err := each(ctx, func(info content.Info) error {
		if s.marked.Has(info.Digest) || !info.CreatedAt.Before(s.Before) {
			keep(info)
			if info.CreatedAt.After(future) && !s.DryRun {
				// The time is from a wrong clock, and would keep the blob until then. Freshen it, so that its grace
				// period begins now.
				if err := s.Store.Freshen(ctx, info.Digest); err != nil && !errdefs.IsNotFound(err) {
					return err
				}
			}
			return nil
		}
		if candidates = append(candidates, info); len(candidates) == batch {
			return sweep()
		}
		return nil
	})
	if err != nil {
		return err
	}
	return sweep()
}

// phase deletes blobs from the beginning of a list until the time is up or the number is reached.
func (s *sweeper) phase(ctx context.Context, rest *[]content.Info) (gone, stay []content.Info, err error) {
	var open []*content.File
	defer func() {
		// Closing a large unlinked file takes as long as freeing its blocks, and nobody should wait for that.
		go func() {
			for _, f := range open {
				_ = f.Close()
			}
		}()
	}()
	unused := s.Store.Unused(s.Before, s.started)
	defer unused.Close()
	for end := time.Now().Add(phaseTime); len(*rest) > 0 && len(gone) < phaseBlobs && time.Now().Before(end); *rest = (*rest)[1:] {
		info := (*rest)[0]
		if s.marked.Has(info.Digest) {
			stay = append(stay, info)
			continue
		}
		if s.DryRun {
			gone = append(gone, info)
			continue
		}
		if info.Size >= large {
			if f, err := s.Store.File(info.Digest); err == nil {
				open = append(open, f)
			}
		}
		err := unused.Delete(info.Digest)
		switch {
		case errdefs.IsNotFound(err):
		case errdefs.IsFailedPrecondition(err), errdefs.IsUnavailable(err): // freshened or labelled since it was listed
			stay = append(stay, info)
		case err != nil:
			return gone, stay, err
		default:
			gone = append(gone, info)
		}
	}
	return gone, stay, ctx.Err()
}

// leftovers deletes what processes that died left behind.
func (s *sweeper) leftovers(ctx context.Context) error {
	alone := func(f func() error) error { return s.alone(ctx, f) }
	if err := s.Store.SweepIngests(ctx, s.Before, s.DryRun, alone, s.Leftovers); err != nil {
		return err
	}
	if err := s.Store.SweepLabels(ctx, s.Before, s.DryRun, s.Leftovers); err != nil {
		return err
	}
	return s.removedNamespaces(ctx)
}

// removedNamespaces deletes the directories of namespaces whose removal was interrupted.
func (s *sweeper) removedNamespaces(ctx context.Context) error {
	dirs, err := subdirs(s.Store, layout.Namespaces)
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if !strings.HasPrefix(dir, ".") || !strings.HasSuffix(dir, removedSuffix) {
			continue
		}
		name := path.Join(layout.Namespaces, dir)
		left := content.Leftover{Path: name}
		if fi, err := s.Store.Tree.Stat(name); err == nil {
			left.ChangedAt = fi.ModTime()
		}
		if !s.DryRun {
			if err := s.alone(ctx, func() error { return s.Store.Tree.RemoveAll(name) }); err != nil {
				return err
			}
		}
		if err := s.Leftovers(left); err != nil {
			return err
		}
	}
	return nil
}
