package image

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"distkit/content"
	"distkit/disk"
	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/events"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// Sweep deletes the blobs that nothing needs, if they were stored, or found stored by an ingest, before a time. Names of all
// namespaces need blobs, and so do containers and the label [LabelRoot]. Entries of an index.json without a name, as other tools
// write them, count as names. Those of referrers ([layout.Entry.DependsOn]) are needed by their subjects, and are removed once nothing needs
// these.
//
// What a document refers to is told by its bytes, whatever media types descriptors have. What is missing, is no document, or has a
// digest of an unknown algorithm refers to nothing. A document that is corrupt refers to every digest that stands in its bytes, and the
// sweep goes on. If names or documents can't be read at all, nothing more is deleted.
//
// A sweep keeps nobody waiting for longer than a moment. It looks at names, documents and blobs without a lock, and deletes in
// short phases. In a phase it has an exclusive lock on the store's hold, and the locks of all names. The invariant is that at
// every deletion
//
//   - nobody holds the store, and nobody can make, move or remove a name or record a container;
//   - all that names, containers and labels reach is marked. For this each phase begins with a look whether an index.json
//     is another file than the one whose names are marked, and whether the store was held since containers and labels were looked
//     at. If so the phase ends at once, what is new is marked, and another phase begins;
//   - the blob isn't marked, and under its own lock it is older than both the given time and the sweep itself.
//
// Marks are only ever added. A document's bytes never change, so what was marked because of it stays right. A blob that comes while
// the sweep goes on is younger than the sweep. If it is a document that was missing, what it refers to is marked before the next
// deletion, provided that whoever brought it held the store.
type Sweep struct {
	Store  *content.Store
	Before time.Time
	DryRun bool          // report, delete nothing, and take no lock
	Wait   time.Duration // in all, for those who hold the store; Unavailable after that
	Only   digest.Digest // delete no other blob; "" for all
	// Snapshots, if set, is called before blobs are deleted. It may delete snapshots that aren't needed, each in a function
	// that it hands to alone, which is called in a phase.
	Snapshots func(ctx context.Context, alone func(func(Needed) error) error) error
	// Leftovers, if set, is called with what processes that died have left, once it is deleted or would be.
	Leftovers func(content.Leftover) error
	// Damaged, if set, is called with an error for each corrupt document.
	Damaged func(error)
}

// Needed is what the images with names, and containers, need of the snapshots.
type Needed struct {
	Chains    Set // chain IDs, by all configs that are in the store
	Snapshots map[Snapshot]bool
}

// Snapshot is one of a namespace, or one that all share, whose namespace is "".
type Snapshot struct{ Driver, Namespace, Key string }

// LabelRoot is the label of a blob that a sweep keeps, with all that it refers to, as if it had a name. Its value means nothing.
// containerd's garbage collection knows it too.
const LabelRoot = "containerd.io/gc.root"

const (
	// slice bounds the time of a phase, and most the blobs that it deletes. A phase begins after a pause, and is so short that it
	// mostly ends before the scheduler gives the processor to others: then everybody who waits for the phase would wait for them too.
	// batch is how many blobs are looked at before a phase.
	slice = 4 * time.Millisecond
	most  = 64
	batch = 2048
	// patience is how often names are marked anew before that counts as waiting.
	patience = 16
	// large is the size in bytes from which deleting a blob takes long. While the file is open, only closing it does.
	large = 16 << 20
	// maxMissing bounds the digests that are remembered because documents refer to them and they aren't here.
	maxMissing = 1 << 20
)

// Run calls f with every blob once it is deleted, or would be. kept is what stays. A store whose directory does not exist has nothing to
// sweep, and is not created.
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

// Kept counts the blobs that a sweep leaves.
type Kept struct {
	Blobs int64 `json:"blobs"`
	Size  int64 `json:"size"` // bytes
}

// Set is a set of digests. It takes them for equal if they end with the same 128 bits: whoever finds such a pair only keeps a blob.
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

// Has reports whether the digest is in the set.
func (s Set) Has(d digest.Digest) bool { _, ok := s[keyOf(d)]; return ok }

// add reports whether the digest is new.
func (s Set) add(d digest.Digest) bool {
	k := keyOf(d)
	if _, ok := s[k]; ok {
		return false
	}
	s[k] = struct{}{}
	return true
}

// sweeper is a sweep that goes on.
type sweeper struct {
	Sweep
	started time.Time
	waited  time.Duration

	names map[string]*markedNames // by namespace

	looked    bool           // at containers, labels and arrivals
	holders   layout.Holders // who had held the store when they were looked at
	held      bool           // somebody held it meanwhile, so that they have to be looked at again
	labelled  time.Time      // when labels were looked at
	pins      map[Pin]bool
	snapshots map[Snapshot]bool // of containers

	dependents     map[[16]byte][]v1.Descriptor // by subject: referrers
	marked, chains Set
	missing        Set // what marked documents refer to that isn't here or is corrupt
	overflow       bool
	damaged        Set // what Damaged was called for
}

func newSweeper(s Sweep) *sweeper {
	return &sweeper{Sweep: s, started: time.Now(), names: map[string]*markedNames{}, pins: map[Pin]bool{}, dependents: map[[16]byte][]v1.Descriptor{},
		marked: Set{}, missing: Set{}, chains: Set{}, damaged: Set{}}
}

// markedNames are the names of a namespace, whose images are marked.
type markedNames struct {
	dir       layout.Dir
	file      *os.File // the index.json that they are from. It is open, so that no other file gets its inode
	size      int64
	changed   time.Time
	entries   map[[16]byte]struct{} // by hash
	referrers []referrer            // the entries that count only with their subject
}

type referrer struct{ digest, subject digest.Digest }

// current reports whether the names of the namespace are still these.
func (m *markedNames) current() bool {
	fi, err := m.file.Stat()
	return err == nil && fi.Size() == m.size && fi.ModTime().Equal(m.changed) && m.dir.Tree.Names(m.dir.File(v1.ImageIndexFile), m.file)
}

func (s *sweeper) close() {
	for _, m := range s.names {
		_ = m.file.Close()
	}
}

// mark marks what isn't marked yet, without a lock.
func (s *sweeper) mark(ctx context.Context) error {
	holders, free := layout.Holders{}, true
	if !s.DryRun {
		var err error
		if holders, free, err = s.Store.Holders(); err != nil {
			return err
		}
	}
	namespaces, err := OpenNamespaces(s.Store).List()
	if err != nil {
		return err
	}
	for namespace, m := range s.names {
		if !slices.Contains(namespaces, namespace) {
			_ = m.file.Close()
			delete(s.names, namespace)
		}
	}
	for _, namespace := range namespaces {
		if err := s.markNames(ctx, namespace); err != nil {
			return err
		}
	}
	if s.looked && !s.held && holders == s.holders {
		return nil
	}
	s.holders, s.held = holders, !free
	return s.markHeld(ctx)
}

// markHeld marks what may have changed while somebody held the store.
func (s *sweeper) markHeld(ctx context.Context) error {
	if err := s.markContainers(ctx); err != nil {
		return err
	}
	if err := s.markRoots(ctx); err != nil {
		return err
	}
	if s.looked {
		if err := s.markArrivals(ctx); err != nil {
			return err
		}
	}
	s.looked = true
	return nil
}

// markNames marks what the entries of a namespace reach that it did not have before.
func (s *sweeper) markNames(ctx context.Context, namespace string) error {
	old := s.names[namespace]
	if old != nil && old.current() {
		return nil
	}
	names, err := openNames(s.Store, namespace)
	if err != nil {
		return err
	}
	m, ix, err := openMarked(names)
	if err != nil {
		return err
	}
	for _, e := range ix.Entries {
		hash := sha256.Sum256(e.Raw)
		key := [16]byte(hash[:])
		d, ok := reference(e.Raw)
		subject := e.DependsOn()
		if ok && subject != "" {
			m.referrers = append(m.referrers, referrer{d.Digest, subject})
		}
		if old != nil {
			if _, there := old.entries[key]; there {
				m.entries[key] = struct{}{}
				continue
			}
		}
		m.entries[key] = struct{}{}
		if !ok || subject != "" && !s.depend(subject, d) {
			continue
		}
		what := func() string { return nameOf(e, d, namespace) }
		// Parts of an image that has got its name again may have been missing.
		if err := s.reach(ctx, d, old != nil, what); err != nil {
			return err
		}
	}
	if old != nil {
		_ = old.file.Close()
		delete(s.names, namespace)
	}
	if m.file != nil {
		s.names[namespace] = m
	}
	return nil
}

// depend notes that a subject needs a referrer. It reports whether the subject is marked, so that the referrer has to be too.
func (s *sweeper) depend(subject digest.Digest, referrer v1.Descriptor) bool {
	key := keyOf(subject)
	s.dependents[key] = append(s.dependents[key], referrer)
	return s.marked.Has(subject)
}

// nameOf and imageOf are what messages call an image: by its entry in a namespace's index, and by a container.
func nameOf(e layout.Entry, d v1.Descriptor, namespace string) string {
	return fmt.Sprintf("image %s of namespace %s", cmp.Or(e.Name, string(d.Digest)), namespace)
}

func imageOf(p Pin) string {
	return fmt.Sprintf("image of container %s of namespace %s", p.ID, p.Namespace)
}

// openMarked reads the names of a namespace. There is no file if there is no layout.
func openMarked(names *Names) (*markedNames, *layout.Index, error) {
	name := names.dir.File(v1.ImageIndexFile)
	for {
		f, err := names.dir.Tree.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			there, err := names.dir.Exists()
			if there {
				continue
			}
			return &markedNames{entries: map[[16]byte]struct{}{}}, &layout.Index{}, err
		}
		if err != nil {
			return nil, nil, fmt.Errorf("read names: %w", err)
		}
		ix, err := names.read()
		var fi fs.FileInfo
		if err == nil {
			fi, err = f.Stat()
		}
		if err != nil {
			_ = f.Close()
			return nil, nil, err
		}
		if m := (&markedNames{names.dir, f, fi.Size(), fi.ModTime(), make(map[[16]byte]struct{}, len(ix.Entries)), nil}); m.current() {
			return m, ix, nil
		}
		_ = f.Close() // it was replaced in between
	}
}

func (s *sweeper) markContainers(ctx context.Context) error {
	pins, err := Pins(s.Store)
	if err != nil {
		return err
	}
	s.snapshots = make(map[Snapshot]bool, len(pins))
	for _, p := range pins {
		s.snapshots[Snapshot{p.Snapshotter, p.Namespace, p.Snapshot}] = true
		s.snapshots[Snapshot{p.Snapshotter, "", p.Snapshot}] = true // it may be one that all namespaces share
		if s.pins[p] {
			continue
		}
		s.pins[p] = true
		what := func() string { return imageOf(p) }
		if err := s.reach(ctx, v1.Descriptor{Digest: p.Image}, s.looked, what); err != nil {
			return err
		}
	}
	return nil
}

// markRoots marks what blobs with LabelRoot reach, if the label has come since the last look.
func (s *sweeper) markRoots(ctx context.Context) error {
	since := s.labelled
	s.labelled = time.Now().Add(-2 * time.Second) // for file systems whose clock is coarse
	return s.Store.Labelled(ctx, LabelRoot, since, func(dgst digest.Digest) error {
		return s.reach(ctx, v1.Descriptor{Digest: dgst}, true, func() string { return fmt.Sprintf("blob %s, which has the label %s", dgst, LabelRoot) })
	})
}

// markArrivals marks what documents refer to that were missing and have come since.
func (s *sweeper) markArrivals(ctx context.Context) error {
	arrived := func(dgst digest.Digest) error {
		delete(s.missing, keyOf(dgst))
		return s.reach(ctx, v1.Descriptor{Digest: dgst}, true, func() string { return "a part of an image" })
	}
	switch {
	case s.overflow: // any young blob may have been missing
		return s.Store.WalkSizes(ctx, func(info content.Info) error {
			if s.missing.Has(info.Digest) || !info.CreatedAt.Before(s.started) {
				return arrived(info.Digest)
			}
			return nil
		})
	case len(s.missing) > 0:
		return s.Store.Digests(ctx, func(dgst digest.Digest) error {
			if s.missing.Has(dgst) {
				return arrived(dgst)
			}
			return nil
		})
	}
	return nil
}

// reach marks a blob and all that it refers to. again is true if documents that are marked have to be read again, since what they
// refer to may have been missing. what names the image for messages.
func (s *sweeper) reach(ctx context.Context, root v1.Descriptor, again bool, what func() string) error {
	if content.Validate(root.Digest) != nil {
		return nil
	}
	err := walk(ctx, root, map[digest.Digest]bool{}, func(d v1.Descriptor, depth int) ([]v1.Descriptor, error) {
		if !s.marked.add(d.Digest) && !again {
			return nil, nil
		}
		b, corrupt, err := s.read(d, depth == 0)
		switch {
		case errdefs.IsNotFound(err):
			s.miss(d.Digest)
			return nil, nil
		case err != nil:
			return nil, err
		case corrupt != nil:
			if s.Damaged != nil && s.damaged.add(d.Digest) {
				s.Damaged(fmt.Errorf("%s: %w; what it may refer to is kept until it is fetched again after dist-verify --delete, or loses its name", what(), corrupt))
			}
			s.miss(d.Digest)
		}
		var children []v1.Descriptor
		follow := func(d v1.Descriptor) {
			if !again && s.marked.Has(d.Digest) {
				return
			}
			var stored bool
			if children, stored = appendStored(children, s.Store, d); !stored {
				s.miss(d.Digest)
			}
		}
		for _, d := range s.dependents[keyOf(d.Digest)] {
			follow(d)
		}
		if corrupt != nil {
			s.scan(b, follow)
			return children, nil
		}
		references(b, func(_ string, d v1.Descriptor) { follow(d) })
		for _, id := range chains(b) {
			s.chains.add(id)
		}
		return children, nil
	})
	if err != nil {
		return fmt.Errorf("%s: %w", what(), err)
	}
	return nil
}

// miss remembers a blob that isn't here, or is corrupt, so that it is looked at when it has come.
func (s *sweeper) miss(dgst digest.Digest) {
	if len(s.missing) < maxMissing {
		s.missing.add(dgst)
	} else {
		s.overflow = true
	}
}

// read returns a blob that may be a document, or nil. If it does not hash to its name, corrupt says so.
func (s *sweeper) read(d v1.Descriptor, root bool) (b []byte, corrupt, err error) {
	w := Walker{Store: s.Store}
	b, err = w.blob(d.Digest)
	if err == nil && b == nil && (root || IsIndex(d.MediaType) || IsManifest(d.MediaType)) {
		// What should be a manifest and isn't may be a corrupt one.
		if _, err = w.read(v1.Descriptor{Digest: d.Digest}); errdefs.IsInvalidArgument(err) {
			err = nil
		}
	}
	if !errdefs.IsDataLoss(err) {
		return b, nil, err
	}
	f, ferr := s.Store.File(d.Digest)
	if ferr != nil {
		return nil, nil, ferr
	}
	defer f.Close()
	b, rerr := disk.ReadAll(f.File, MaxDocument)
	if rerr != nil {
		return nil, nil, errRead(d.Digest, rerr)
	}
	return b, err, nil
}

var anyDigest = regexp.MustCompile(`sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128}`)

// maxRuns bounds the chain IDs that are computed for a corrupt document.
const maxRuns = 1 << 15

// scan calls follow with every digest that stands in the bytes of a corrupt document. If that is an image config, some of them in a row are
// its diff IDs: the chains of all rows are marked.
func (s *sweeper) scan(b []byte, follow func(v1.Descriptor)) {
	var all []digest.Digest
	for _, m := range anyDigest.FindAll(b, -1) {
		d := digest.Digest(m)
		follow(v1.Descriptor{Digest: d})
		if len(all) < maxLayers {
			all = append(all, d)
		}
	}
	for left := maxRuns; len(all) > 0 && left > 0; all = all[1:] {
		for _, id := range identity.ChainIDs(slices.Clone(all[:min(len(all), left)])) {
			s.chains.add(id)
			left--
		}
	}
}

// alone calls f in a phase. A dry run has none.
func (s *sweeper) alone(ctx context.Context, f func() error) error {
	if s.DryRun {
		return f()
	}
	for try := 1; ; try++ {
		began := time.Now()
		unlock, current, err := s.lock(ctx)
		if err != nil {
			return err
		}
		locked := time.Now()
		if current {
			err := f()
			unlock()
			pause(ctx, min(time.Since(locked), slice)) // for those who wait
			return cmp.Or(err, ctx.Err())
		}
		unlock()
		if err := s.mark(ctx); err != nil {
			return err
		}
		if try > patience {
			if s.waited += time.Since(began); s.waited > s.Wait {
				return errclass.Errorf(errdefs.ErrUnavailable, "sweep %s: busy: names, containers or blobs change all the time", s.Store.Root())
			}
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// nameWait is how long others may change the names of a namespace without a pause.
const nameWait = 30 * time.Second

// lock begins a phase. current is false if something has to be marked first. While it waits for one lock it has no other one.
func (s *sweeper) lock(ctx context.Context) (unlock func(), current bool, err error) {
	for end := time.Now().Add(nameWait); ; {
		began := time.Now()
		hold, err := s.Store.Exclude(ctx, s.Wait-s.waited)
		if d := time.Since(began); d > slice {
			s.waited += d
		}
		if err != nil {
			return nil, false, err
		}
		unlockNames, current, err := s.lockNames()
		unlock := func() {
			unlockNames()
			disk.Release(hold)
		}
		if err == nil && current {
			current, err = s.unheld(ctx, hold)
		}
		if err == nil {
			return unlock, current, nil
		}
		unlock()
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, false, fmt.Errorf("sweep %s: %w", s.Store.Root(), err)
		}
		if time.Now().After(end) {
			return nil, false, errclass.Errorf(errdefs.ErrUnavailable, "sweep %s: busy: %w", s.Store.Root(), err)
		}
		pause(ctx, slice)
		if err := ctx.Err(); err != nil {
			return nil, false, err
		}
	}
}

// unheld reports whether nobody has held the store since containers, labels and arrivals were looked at.
func (s *sweeper) unheld(ctx context.Context, hold *os.File) (bool, error) {
	now, err := layout.HoldersOf(hold)
	if err != nil {
		return false, err
	}
	if now.Blind {
		// Nothing tells who has held it. Now nobody does.
		return true, s.markHeld(ctx)
	}
	return !s.held && now == s.holders, nil
}

// lockNames locks the names of all namespaces, so that none is made or changed until unlock is called. current is false if they
// are not those that are marked. EWOULDBLOCK: somebody is changing them.
func (s *sweeper) lockNames() (unlock func(), current bool, err error) {
	var locked []*os.File
	unlock = func() {
		for _, f := range locked {
			disk.Unlock(f)
		}
	}
	all, err := lockNamespaces(context.Background(), s.Store, unix.LOCK_EX|unix.LOCK_NB)
	if err != nil {
		return unlock, false, err
	}
	unlockNames := unlock
	unlock = func() {
		unlockNames()
		disk.Release(all)
	}
	for namespace, m := range s.names {
		if err := disk.Lock(m.file, unix.LOCK_SH|unix.LOCK_NB); err != nil {
			return unlock, false, fmt.Errorf("lock names of namespace %s: %w", namespace, err)
		}
		locked = append(locked, m.file)
		if !m.current() {
			return unlock, false, nil
		}
	}
	dirs, err := subdirs(s.Store, layout.Namespaces)
	if err != nil {
		return unlock, false, err
	}
	for _, name := range append(dirs, DefaultNamespace) {
		if s.names[name] == nil && identifier(name) {
			if there, err := OpenNamespaces(s.Store).exists(name); err != nil || there {
				return unlock, false, err
			}
		}
	}
	return unlock, true, nil
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

// dropFrom is dropReferrers in a phase, for one namespace. Who was quicker to lock its names may wait for those of another namespace, which
// this phase has: the entries are then left to the next sweep, as they are if the names have changed.
func (s *sweeper) dropFrom(ctx context.Context, m *markedNames) error {
	if m == nil {
		return nil
	}
	disk.Unlock(m.file)
	short, cancel := context.WithTimeout(ctx, slice)
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

// dropped reports whether nothing needs a referrer or its subject, and its blob is old enough to be deleted, or isn't there.
func (s *sweeper) dropped(r referrer) bool {
	if s.marked.Has(r.digest) || s.marked.Has(r.subject) {
		return false
	}
	fi, err := s.Store.Tree.Stat(layout.BlobName(r.digest))
	return errors.Is(err, fs.ErrNotExist) || err == nil && fi.ModTime().Before(s.Before)
}

// blobs deletes the blobs that are not marked, some in each phase, and calls f with those after it.
func (s *sweeper) blobs(ctx context.Context, kept *Kept, f func(content.Info) error) error {
	keep := func(info content.Info) {
		kept.Blobs++
		kept.Size += info.Size
	}
	candidates := make([]content.Info, 0, batch)
	sweep := func() error {
		defer func() { candidates = candidates[:0] }()
		// Those that share a lock follow each other.
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
			if err != nil && !errdefs.IsDataLoss(err) { // of its labels
				return err
			}
			return f(info)
		}
	}
	err := each(ctx, func(info content.Info) error {
		if s.marked.Has(info.Digest) || !info.CreatedAt.Before(s.Before) {
			keep(info)
			if info.CreatedAt.After(future) && !s.DryRun {
				// The time comes from a wrong clock, and would keep the blob until then. Its grace begins now instead.
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

// phase deletes blobs from the beginning of a list until its time is over, or there are enough.
func (s *sweeper) phase(ctx context.Context, rest *[]content.Info) (gone, stay []content.Info, err error) {
	var open []*content.File
	defer func() {
		// Closing a large file that has no name any more takes as long as freeing it, and nobody is to wait for that.
		go func() {
			for _, f := range open {
				_ = f.Close()
			}
		}()
	}()
	unused := s.Store.Unused(s.Before, s.started)
	defer unused.Close()
	for end := time.Now().Add(slice); len(*rest) > 0 && len(gone) < most && time.Now().Before(end); *rest = (*rest)[1:] {
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
		case errdefs.IsFailedPrecondition(err), errdefs.IsUnavailable(err): // freshened or labelled since it was looked at
			stay = append(stay, info)
		case err != nil:
			return gone, stay, err
		default:
			gone = append(gone, info)
		}
	}
	return gone, stay, ctx.Err()
}

// leftovers deletes what processes that died have left.
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

// removedNamespaces deletes the directories of namespaces whose removal was cut short.
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
