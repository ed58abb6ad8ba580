package image

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"distkit/content"
	"distkit/disk"
	"distkit/disk/layout"
)

// sweeper is the state of a sweep.
type sweeper struct {
	Sweep
	started time.Time
	waited  time.Duration

	names map[string]*markedNames // by namespace

	read      bool           // containers and labels were read
	holders   layout.Holders // the state of the hold at that time
	held      bool           // a process held the store at that time, so they must be read again
	labelled  time.Time      // when labels were read
	pins      map[Pin]bool
	snapshots map[Snapshot]bool // used by containers

	dependents     map[[16]byte][]v1.Descriptor // referrers by the key of their subject
	marked, chains Set
	missing        Set  // what marked documents refer to that is missing or corrupt
	overflow       bool // missing is incomplete
	damaged        Set  // the documents that Damaged was called for
}

func newSweeper(s Sweep) *sweeper {
	return &sweeper{Sweep: s, started: time.Now(), names: map[string]*markedNames{}, pins: map[Pin]bool{}, dependents: map[[16]byte][]v1.Descriptor{},
		marked: Set{}, missing: Set{}, chains: Set{}, damaged: Set{}}
}

// markedNames are the names of a namespace, whose images are marked.
type markedNames struct {
	dir       layout.Dir
	file      *os.File // the index.json with the names, kept open so that no other file gets its inode
	size      int64
	changed   time.Time
	entries   map[[16]byte]struct{} // by hash
	referrers []referrer            // the entries that depend on their subjects
}

type referrer struct{ digest, subject digest.Digest }

// current reports whether these are still the names of the namespace.
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
	if s.read && !s.held && holders == s.holders {
		return nil
	}
	s.holders, s.held = holders, !free
	return s.markHeld(ctx)
}

// markHeld marks what may have changed while another process held the store.
func (s *sweeper) markHeld(ctx context.Context) error {
	if err := s.markContainers(ctx); err != nil {
		return err
	}
	if err := s.markRoots(ctx); err != nil {
		return err
	}
	if s.read {
		if err := s.markArrivals(ctx); err != nil {
			return err
		}
	}
	s.read = true
	return nil
}

// markNames marks what new entries of a namespace reach.
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
			if _, known := old.entries[key]; known {
				m.entries[key] = struct{}{}
				continue
			}
		}
		m.entries[key] = struct{}{}
		if !ok || subject != "" && !s.depend(subject, d) {
			continue
		}
		what := func() string { return nameOf(e, d, namespace) }
		// Parts of an image that got its name again may have been missing.
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

// depend records that a subject needs a referrer. It reports whether the subject is marked, so that the referrer must
// be marked too.
func (s *sweeper) depend(subject digest.Digest, referrer v1.Descriptor) bool {
	key := keyOf(subject)
	s.dependents[key] = append(s.dependents[key], referrer)
	return s.marked.Has(subject)
}

// nameOf and imageOf name an image in messages: by its entry in a namespace's index, or by a container.
func nameOf(e layout.Entry, d v1.Descriptor, namespace string) string {
	return fmt.Sprintf("image %s of namespace %s", cmp.Or(e.Name, string(d.Digest)), namespace)
}

func imageOf(p Pin) string {
	return fmt.Sprintf("image of container %s of namespace %s", p.ID, p.Namespace)
}

// openMarked reads the names of a namespace. file is nil if the layout doesn't exist.
func openMarked(names *Names) (*markedNames, *layout.Index, error) {
	name := names.dir.File(v1.ImageIndexFile)
	for {
		f, err := names.dir.Tree.Open(name)
		if errors.Is(err, fs.ErrNotExist) {
			exists, err := names.dir.Exists()
			if exists {
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
		_ = f.Close() // replaced since it was opened
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
		if err := s.reach(ctx, v1.Descriptor{Digest: p.Image}, s.read, what); err != nil {
			return err
		}
	}
	return nil
}

// markRoots marks what blobs with LabelRoot reach, if the label was set since the last call.
func (s *sweeper) markRoots(ctx context.Context) error {
	since := s.labelled
	s.labelled = time.Now().Add(-2 * time.Second) // for file systems with coarse times
	return s.Store.Labelled(ctx, LabelRoot, since, func(dgst digest.Digest) error {
		return s.reach(ctx, v1.Descriptor{Digest: dgst}, true, func() string { return fmt.Sprintf("blob %s, which has the label %s", dgst, LabelRoot) })
	})
}

// markArrivals marks what documents refer to that were missing and are stored now.
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

// reach marks a blob and everything that it refers to. With again it also rereads marked documents, because what they
// refer to may have been missing. what names the image for messages.
func (s *sweeper) reach(ctx context.Context, root v1.Descriptor, again bool, what func() string) error {
	if content.Validate(root.Digest) != nil {
		return nil
	}
	err := walk(ctx, root, map[digest.Digest]bool{}, func(d v1.Descriptor, depth int) ([]v1.Descriptor, error) {
		if !s.marked.add(d.Digest) && !again {
			return nil, nil
		}
		b, corrupt, err := s.readDocument(d, depth == 0)
		switch {
		case errdefs.IsNotFound(err):
			s.miss(d.Digest)
			return nil, nil
		case err != nil:
			return nil, err
		case corrupt != nil:
			if s.Damaged != nil && s.damaged.add(d.Digest) {
				s.Damaged(fmt.Errorf("%s: %w; every blob that it may refer to is kept: delete it with dist-verify --delete and fetch it again, or remove its name", what(), corrupt))
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

// miss remembers a blob that is missing or corrupt, so that it is read when it is stored.
func (s *sweeper) miss(dgst digest.Digest) {
	if len(s.missing) < maxMissing {
		s.missing.add(dgst)
	} else {
		s.overflow = true
	}
}

// readDocument returns the content of a blob that may be a document, or nil. If the content doesn't hash to its name,
// corrupt is the reason.
func (s *sweeper) readDocument(d v1.Descriptor, root bool) (b []byte, corrupt, err error) {
	w := Walker{Store: s.Store}
	b, err = w.blob(d.Digest)
	if err == nil && b == nil && (root || IsIndex(d.MediaType) || IsManifest(d.MediaType)) {
		// A blob that should be a manifest but isn't may be a corrupt one.
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

// maxRuns bounds the number of chain IDs that are computed for a corrupt document.
const maxRuns = 1 << 15

// scan calls follow with every digest in the bytes of a corrupt document. If it is an image config, a sequence of them
// are its diff IDs: so the chains of all sequences are marked.
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
