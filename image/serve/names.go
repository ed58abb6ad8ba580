package serve

import (
	"cmp"
	"context"
	"net/http"
	"slices"
	"strings"
	"sync"

	"distkit/disk/layout"
	"distkit/image"
	"distkit/refname"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// hub is the host of image names without one, as docker and containerd read them.
const hub = "docker.io"

// candidates returns the names that a repository and a tag may stand for; the first existing one counts. upstream is
// the host for which a client asks a mirror (containerd's parameter ns): then only images of that host count.
func (s *Server) candidates(repository, tag, upstream string) []string {
	if upstream != "" {
		return []string{upstream + "/" + repository + ":" + tag}
	}
	names := []string{repository + ":" + tag}
	if repository == s.Bare {
		names = append(names, tag)
	}
	return append(names, hub+"/"+repository+":"+tag)
}

// upstream returns the host for which a client asks a mirror, or "".
func upstream(r *http.Request) string { return r.URL.Query().Get("ns") }

// cache keeps the content of index.json until it changes.
type cache struct {
	mu           sync.Mutex
	watched      *image.Watched
	repositories map[string][]string // sorted tags by repository; nil if not read yet
	referrers    map[digest.Digest][]v1.Descriptor

	repairs int // how often referrers was discarded because a document may have arrived

	reading sync.Mutex // held while documents are read for referrers; locked before mu
	// described has what was read from the documents in the index. It outlives changes of the index.
	described map[digest.Digest]described
}

// described is what a document says about itself. subject is "" if it isn't a referrer.
type described struct {
	subject      digest.Digest
	artifactType string
	size         int64
}

// refresh reads the names again if they have changed. The caller holds mu.
func (s *Server) refresh() (*cache, error) {
	c := &s.names
	if c.watched != nil && c.watched.Current() {
		return c, nil
	}
	w, err := s.Names.Watch()
	if err != nil {
		return nil, err
	}
	if c.watched != nil {
		c.watched.Close()
	}
	c.watched, c.repositories, c.referrers = w, nil, nil
	return c, nil
}

// lookup returns the image for a repository and a tag. NotFound if there is none.
func (s *Server) lookup(repository, tag, upstream string) (image.Image, error) {
	s.names.mu.Lock()
	defer s.names.mu.Unlock()
	c, err := s.refresh()
	if err != nil {
		return image.Image{}, err
	}
	for _, name := range s.candidates(repository, tag, upstream) {
		img, gerr := c.watched.Get(name)
		if gerr == nil || !errdefs.IsNotFound(gerr) {
			return img, gerr
		}
		err = gerr
	}
	return image.Image{}, err
}

// tagged returns the descriptor of a document that a referrer tag attaches. Such a tag is not a name.
func (s *Server) tagged(tag string) (v1.Descriptor, bool) {
	s.names.mu.Lock()
	defer s.names.mu.Unlock()
	c, err := s.refresh()
	if err != nil {
		return v1.Descriptor{}, false
	}
	return c.watched.Tagged(tag)
}

// list returns the sorted tags of each repository. Names that aren't a repository with a tag are left out, because
// nobody could request them.
func (s *Server) list() (map[string][]string, error) {
	s.names.mu.Lock()
	defer s.names.mu.Unlock()
	c, err := s.refresh()
	if err != nil || c.repositories != nil {
		return c.known(), err
	}
	all := map[string][]string{}
	for img, err := range c.watched.All() {
		if err != nil {
			continue // an entry that isn't a descriptor can't be requested either
		}
		repository, tag, ok := s.split(img.Name)
		if !ok {
			continue
		}
		if all[repository] == nil {
			all[repository] = []string{}
		}
		if tag != "" {
			all[repository] = append(all[repository], tag)
		}
	}
	for repository, tags := range all {
		slices.Sort(tags)
		all[repository] = slices.Compact(tags)
	}
	c.repositories = all
	return all, nil
}

// split returns the repository and the tag as which a name is listed.
func (s *Server) split(name string) (repository, tag string, ok bool) {
	if s.Bare != "" && refname.IsTag(name) {
		return s.Bare, name, true
	}
	if repository, tag, ok = refname.Split(name); strings.Contains(name, "@") {
		tag = "" // lookup would not find it
	}
	return repository, tag, ok
}

// namesOf returns the names in a repository that point at a manifest.
func (s *Server) namesOf(dgst digest.Digest, repository, upstream string) (names []string, err error) {
	s.names.mu.Lock()
	defer s.names.mu.Unlock()
	c, err := s.refresh()
	if err != nil {
		return nil, err
	}
	for img, err := range c.watched.All() {
		if err != nil || img.Target.Digest != dgst {
			continue
		}
		of, _, ok := s.split(img.Name)
		switch {
		case !ok:
		case upstream != "" && of == upstream+"/"+repository, upstream == "" && (of == repository || of == hub+"/"+repository):
			names = append(names, img.Name)
		}
	}
	return names, nil
}

func (c *cache) known() map[string][]string {
	if c == nil {
		return nil
	}
	return c.repositories
}

// tagsOf returns the tags of a repository that lookup finds.
func (s *Server) tagsOf(repository, upstream string) (tags []string, ok bool, err error) {
	all, err := s.list()
	if err != nil {
		return nil, false, err
	}
	if upstream != "" {
		tags, ok = all[upstream+"/"+repository]
		return tags, ok, nil
	}
	own, ok1 := all[repository]
	mirrored, ok2 := all[hub+"/"+repository]
	tags = slices.Concat(own, mirrored)
	slices.Sort(tags)
	return slices.Compact(tags), ok1 || ok2, nil
}

// referrersOf returns the manifests with a subject. It reads documents without holding the lock of the names.
func (s *Server) referrersOf(ctx context.Context, subject digest.Digest) ([]v1.Descriptor, error) {
	all, _, _, err := s.knownReferrers()
	if all != nil || err != nil {
		return all[subject], err
	}
	s.names.reading.Lock()
	defer s.names.reading.Unlock()
	all, watched, repairs, err := s.knownReferrers()
	if all != nil || err != nil {
		return all[subject], err // another request has read them
	}
	all = map[digest.Digest][]v1.Descriptor{}
	known := map[digest.Digest]described{}
	for d := range watched.Targets() {
		doc, ok := s.names.described[d.Digest]
		if !ok {
			err := s.document(ctx, d.Digest, func(b []byte) {
				if doc.subject = layout.Subject(b); doc.subject != "" {
					doc.artifactType, _ = layout.DescribeReferrer(b)
				}
				doc.size = int64(len(b))
			})
			if err != nil {
				continue // missing or corrupt: it may still arrive
			}
		}
		known[d.Digest] = doc
		if doc.subject != "" {
			all[doc.subject] = append(all[doc.subject], v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: doc.size, ArtifactType: doc.artifactType})
		}
	}
	for _, list := range all {
		slices.SortFunc(list, func(a, b v1.Descriptor) int { return cmp.Compare(a.Digest, b.Digest) })
	}
	s.names.mu.Lock()
	defer s.names.mu.Unlock()
	s.names.described = known
	if s.names.watched == watched && s.names.repairs == repairs {
		s.names.referrers = all
	}
	return all[subject], nil
}

// knownReferrers returns all referrers if they are cached, or else the names from which to read them, and the count of
// repairs.
func (s *Server) knownReferrers() (all map[digest.Digest][]v1.Descriptor, watched *image.Watched, repairs int, err error) {
	s.names.mu.Lock()
	defer s.names.mu.Unlock()
	c, err := s.refresh()
	if err != nil {
		return nil, nil, 0, err
	}
	return c.referrers, c.watched, c.repairs, nil
}

// forgetReferrers discards the cached referrers, after a document has arrived that the index may have listed before.
func (s *Server) forgetReferrers() {
	s.names.mu.Lock()
	defer s.names.mu.Unlock()
	s.names.referrers = nil
	s.names.repairs++
}

// after returns up to n elements of a sorted list that come after last, which need not be in the list. more is true if
// there are further ones.
func after(list []string, last string, n int) (part []string, more bool) {
	i, found := slices.BinarySearch(list, last)
	if found {
		i++
	}
	part = list[i:]
	return part[:min(n, len(part))], len(part) > n
}
