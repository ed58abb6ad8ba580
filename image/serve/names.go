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

// hub is the host of images whose names have none, as docker and containerd read them.
const hub = "docker.io"

// candidates are the names that a repository and a tag can stand for, the first that there is counts. upstream is the host
// that a client asks a mirror for (containerd's parameter ns): then no other host's image will do.
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

// upstream is the host for which a client asks a mirror, or "".
func upstream(r *http.Request) string { return r.URL.Query().Get("ns") }

// cache keeps what index.json says while nobody changes it.
type cache struct {
	mu           sync.Mutex
	watched      *image.Watched
	repositories map[string][]string // to sorted tags; nil while not known
	referrers    map[digest.Digest][]v1.Descriptor

	repairs int // how often referrers was forgotten because a document may have come

	reading sync.Mutex // held while documents are read for referrers, and locked before mu
	// described is what documents of the index told that were read. It outlasts changes of the index.
	described map[digest.Digest]described
}

// described is what a document tells of itself: subject is "" if it is no referrer.
type described struct {
	subject      digest.Digest
	artifactType string
	size         int64
}

// refresh reads the names again if they have changed. The caller has the lock.
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

// lookup returns the image that a repository and a tag stand for. NotFound if there is none.
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

// tagged returns what the store keeps of a signature with a tag, which has no name.
func (s *Server) tagged(tag string) (v1.Descriptor, bool) {
	s.names.mu.Lock()
	defer s.names.mu.Unlock()
	c, err := s.refresh()
	if err != nil {
		return v1.Descriptor{}, false
	}
	return c.watched.Tagged(tag)
}

// list returns the tags of each repository, and the repositories, sorted. Names that are no repository with a tag are
// left out, since nobody could ask for them.
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
			continue // an entry that is no descriptor can't be asked for either
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

// split returns the repository and tag that a name is listed as.
func (s *Server) split(name string) (repository, tag string, ok bool) {
	if s.Bare != "" && refname.IsTag(name) {
		return s.Bare, name, true
	}
	if repository, tag, ok = refname.Split(name); strings.Contains(name, "@") {
		tag = "" // lookup would not find it
	}
	return repository, tag, ok
}

// namesOf returns the names of a repository that point at a manifest.
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

// tagsOf returns the tags of a repository as lookup would find them.
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

// referrersOf returns the manifests whose subject is the digest. Documents are read without the lock of the names.
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
		is, ok := s.names.described[d.Digest]
		if !ok {
			err := s.document(ctx, d.Digest, func(b []byte) {
				if is.subject = layout.Subject(b); is.subject != "" {
					is.artifactType, _ = layout.DescribeReferrer(b)
				}
				is.size = int64(len(b))
			})
			if err != nil {
				continue // it is not here, or corrupt, and may come
			}
		}
		known[d.Digest] = is
		if is.subject != "" {
			all[is.subject] = append(all[is.subject], v1.Descriptor{MediaType: d.MediaType, Digest: d.Digest, Size: is.size, ArtifactType: is.artifactType})
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

// knownReferrers returns all referrers if they are known, else the names from which they can be read, and the count of repairs.
func (s *Server) knownReferrers() (all map[digest.Digest][]v1.Descriptor, watched *image.Watched, repairs int, err error) {
	s.names.mu.Lock()
	defer s.names.mu.Unlock()
	c, err := s.refresh()
	if err != nil {
		return nil, nil, 0, err
	}
	return c.referrers, c.watched, c.repairs, nil
}

// forgetReferrers is called once a document has come whose entry may have been in the index before.
func (s *Server) forgetReferrers() {
	s.names.mu.Lock()
	defer s.names.mu.Unlock()
	s.names.referrers = nil
	s.names.repairs++
}

// after returns the part of a sorted list behind an element, which need not be in it, no more than n long. more is true if it
// goes on then.
func after(list []string, last string, n int) (part []string, more bool) {
	at, found := slices.BinarySearch(list, last)
	if found {
		at++
	}
	part = list[at:]
	return part[:min(n, len(part))], len(part) > n
}
