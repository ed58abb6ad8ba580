package remotes

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"distkit/disk"
	ondisk "distkit/disk/layout"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

const (
	// maxListTries is how often to try to change a list of referrers while other clients change it too.
	maxListTries = 10
	maxListPause = 2 * time.Second
	// listPatience is how long another process of this user may take to change the same list.
	listPatience = time.Minute
)

// referrersTag returns the tag under which a registry without the referrers API keeps the list (OCI distribution
// specification, "Referrers Tag Schema"). The list is an index.
func referrersTag(subject digest.Digest) object {
	algorithm, encoded := subject.Algorithm().String(), subject.Encoded()
	return object{tag: algorithm[:min(len(algorithm), 32)] + "-" + encoded[:min(len(encoded), 64)]}
}

// referrer has the field that makes a manifest a referrer.
type referrer struct {
	Subject *ocispec.Descriptor `json:"subject"`
}

// errNoReferrers reports that a host lists no referrers. The next host is tried, because a mirror may lack what its
// registry has.
var errNoReferrers = errors.New("no referrers")

// Referrers lists the manifests that have the digest as their subject. For a registry without the referrers API, it
// reads the list that clients keep under a tag.
func (r *Registry) Referrers(ctx context.Context, subject digest.Digest, filter ReferrerFilter) iter.Seq2[ocispec.Descriptor, error] {
	return func(yield func(ocispec.Descriptor, error) bool) {
		listed := 0
		err := r.firstHost(ctx, canResolve, func(c *client, t *tries) error {
			err := r.referrers(ctx, c, t, subject, filter.ArtifactType, func(d ocispec.Descriptor) error {
				if listed++; listed > maxListed {
					return classf(errdefs.ErrDataLoss, "the list has more than %d", maxListed)
				}
				if filter.selects(d) && !yield(d, nil) {
					return errStopped
				}
				return nil
			})
			switch {
			case err != nil && listed > 0:
				return finalError{err}
			case err == nil && listed == 0:
				return errNoReferrers
			}
			return err
		})
		if err != nil && err != errStopped && err != errNoReferrers {
			yield(ocispec.Descriptor{}, fmt.Errorf("list referrers of %s@%s: %w", r.locator, subject, err))
		}
	}
}

// referrers calls f with the manifests in the registry's list, and with those that tags attach to the subject.
func (r *Registry) referrers(ctx context.Context, c *client, t *tries, subject digest.Digest, artifactType string, give func(ocispec.Descriptor) error) error {
	if err := r.listReferrers(ctx, c, t, subject, artifactType, give); err != nil {
		return err
	}
	for _, tag := range ondisk.ReferrerTags(subject, artifactType) {
		m, err := r.manifest(ctx, c, c.newTries(maxTries), object{tag: tag.Tag}, accept(""))
		switch {
		case errdefs.IsNotFound(err) || isStatus(err, http.StatusBadRequest):
		case err != nil:
			return err
		default:
			if err := give(tag.Tagged(m.descriptor)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (r *Registry) listReferrers(ctx context.Context, c *client, t *tries, subject digest.Digest, artifactType string, give func(ocispec.Descriptor) error) error {
	req := r.request(c, http.MethodGet, "referrers", subject.String())
	req.header.Set("Accept", ocispec.MediaTypeImageIndex)
	if artifactType != "" {
		if req.query == nil {
			req.query = url.Values{}
		}
		req.query.Set("artifactType", artifactType)
	}
	first, last := true, digest.Digest("")
	for p, err := range c.pages(ctx, req, t) {
		var entries []ocispec.Descriptor
		switch ok := false; {
		case first && isNoAPI(err):
			return r.listTagged(ctx, c, subject, nil, give)
		case err != nil:
			return err
		default:
			if entries, ok = referrersPage(p); ok {
				break
			}
			err := classf(errdefs.ErrDataLoss, "%s sent something else than an index", c.host)
			if first {
				// A gateway may reply to an unknown request with a page of its own.
				return r.listTagged(ctx, c, subject, err, give)
			}
			return err
		}
		first = false
		if n := len(entries); p.next != nil && (n == 0 || entries[n-1].Digest == last) {
			return errCircles()
		} else if n > 0 {
			last = entries[n-1].Digest
		}
		if err := giveAll(entries, give); err != nil {
			return err
		}
	}
	return nil
}

// isNoAPI reports whether a registry refused the request because it has no referrers API. Some redirect it to another
// host, such as a web site, whose refusal means the same (ghcr.io). A server error of that host is an error.
func isNoAPI(err error) bool {
	var e *statusError
	return errors.As(err, &e) && (e.elsewhere && e.status < 500 || isStatus(err, http.StatusNotFound, http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusNotImplemented))
}

// referrersPage parses a page of the API's list; ok is false if it isn't one.
func referrersPage(p page) (entries []ocispec.Descriptor, ok bool) {
	var index ocispec.Index
	if err := decode(p.content, &index); err != nil || index.Manifests == nil {
		return nil, false
	}
	mediaType, _, _ := strings.Cut(p.header.Get("Content-Type"), ";")
	return index.Manifests, isIndex(strings.TrimSpace(mediaType)) || isIndex(index.MediaType)
}

func giveAll(entries []ocispec.Descriptor, give func(ocispec.Descriptor) error) error {
	for _, m := range entries {
		if m.Digest.Validate() != nil {
			return classf(errdefs.ErrDataLoss, "the list has an entry without digest")
		}
		if err := give(m); err != nil {
			return err
		}
	}
	return nil
}

// listTagged calls f with the entries of the list under the subject's tag. If there is no such tag, it returns absent,
// which is nil if that means that the subject has no referrers.
func (r *Registry) listTagged(ctx context.Context, c *client, subject digest.Digest, absent error, give func(ocispec.Descriptor) error) error {
	list, err := r.taggedReferrers(ctx, c, subject)
	if err == nil && list.content == "" {
		err = absent
	}
	if err != nil {
		return err
	}
	return giveAll(list.descriptors(), give)
}

// referrersList is the index under a subject's tag. Unknown members and entries are kept.
type referrersList struct {
	members map[string]json.RawMessage
	entries []listEntry
	content string // as received; "" if the list doesn't exist
	etag    string
}

type listEntry struct {
	ocispec.Descriptor
	raw json.RawMessage
}

func (e *listEntry) UnmarshalJSON(b []byte) error {
	e.raw = slices.Clone(b)
	return json.Unmarshal(b, &e.Descriptor)
}

func (e listEntry) MarshalJSON() ([]byte, error) { return e.raw, nil }

func (l *referrersList) descriptors() []ocispec.Descriptor {
	list := make([]ocispec.Descriptor, 0, len(l.entries))
	for _, e := range l.entries {
		list = append(list, e.Descriptor)
	}
	return list
}

func (l *referrersList) has(d digest.Digest) bool {
	return slices.ContainsFunc(l.entries, func(e listEntry) bool { return e.Digest == d })
}

func (l *referrersList) encode() ([]byte, error) {
	members := map[string]any{"schemaVersion": 2}
	for name, v := range l.members {
		members[name] = v
	}
	members["mediaType"] = ocispec.MediaTypeImageIndex
	members["manifests"] = append([]listEntry{}, l.entries...)
	b, err := json.Marshal(members)
	if err == nil && len(b) > MaxManifest {
		err = errors.New("the list of referrers is full")
	}
	return b, err
}

// errNoList reports that the tag of a list of referrers is something else.
var errNoList = errors.New("not an index")

// taggedReferrers reads the list under the subject's tag. The result is empty if the list doesn't exist.
func (r *Registry) taggedReferrers(ctx context.Context, c *client, subject digest.Digest) (*referrersList, error) {
	tag := referrersTag(subject)
	m, err := r.manifest(ctx, c, c.newTries(maxTries), tag, accept(ocispec.MediaTypeImageIndex))
	switch {
	case errdefs.IsNotFound(err):
		return &referrersList{}, nil
	case err != nil:
		return nil, err
	case subject.Algorithm().FromBytes(m.content) == subject:
		// Some registries resolve a tag of this form to the digest (oras-go#1396).
		return &referrersList{}, nil
	case !isIndex(m.descriptor.MediaType):
		return nil, classf(errdefs.ErrDataLoss, "tag %s: %w but %s", tag.tag, errNoList, printable(m.descriptor.MediaType))
	}
	list := &referrersList{content: string(m.content), etag: m.etag}
	var index struct {
		Manifests []listEntry `json:"manifests"`
	}
	if err = decode(m.content, &list.members); err == nil {
		err = decode(m.content, &index)
	}
	if err != nil {
		return nil, classf(errdefs.ErrDataLoss, "tag %s: %w: %s", tag.tag, errNoList, printable(err.Error()))
	}
	list.entries = index.Manifests
	return list, nil
}

// linkReferrer adds a manifest to the list under its subject's tag.
func (p *push) linkReferrer(subject digest.Digest, desc ocispec.Descriptor, manifest []byte) error {
	if err := subject.Validate(); err != nil {
		return classf(errdefs.ErrInvalidArgument, "subject: %w", err)
	}
	desc.ArtifactType, desc.Annotations = ondisk.DescribeReferrer(manifest)
	raw, err := json.Marshal(desc)
	if err != nil {
		return err
	}
	return p.changeReferrers(subject, func(l *referrersList) (changed bool) {
		if l.has(desc.Digest) {
			return false
		}
		l.entries = append(l.entries, listEntry{desc, raw})
		return true
	})
}

// unlinkReferrer removes a manifest from the list under its subject's tag, if it is there.
func (p *push) unlinkReferrer(subject, referrer digest.Digest) error {
	err := p.changeReferrers(subject, func(l *referrersList) (changed bool) {
		changed = l.has(referrer)
		l.entries = slices.DeleteFunc(l.entries, func(e listEntry) bool { return e.Digest == referrer })
		return changed
	})
	if errors.Is(err, errNoList) {
		return nil
	}
	return err
}

// changeReferrers applies change to the list under a subject's tag until change reports nothing to do: after each put
// the list is read again. Processes of this user take turns. Against other clients, the registry is asked to replace
// only the version that was read, if it gave an entity tag.
func (p *push) changeReferrers(subject digest.Digest, change func(*referrersList) (changed bool)) error {
	tag := referrersTag(subject)
	unlock, err := p.lockReferrers(tag)
	if err != nil {
		return err
	}
	defer unlock()
	pauses := p.client.newTries(maxListTries)
	pruned := false
	var refused referrersList
	for try := range maxListTries {
		if try > 1 {
			if err := sleep(p.ctx, min(pauses.next(), maxListPause)); err != nil {
				return err
			}
		}
		list, err := p.taggedReferrers(p.ctx, p.client, subject)
		if err != nil {
			return err
		}
		if !change(list) {
			return nil
		}
		if list.etag == refused.etag && list.content == refused.content {
			list.etag = "" // the list is unchanged: the registry compares with something else
		}
		b, err := list.encode()
		if err != nil {
			return err
		}
		desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageIndex, Digest: digest.FromBytes(b)}
		p.tries = p.client.newTries(maxTries)
		_, err = p.putManifest(tag, desc, b, list.etag)
		switch {
		case isStatus(err, http.StatusPreconditionFailed) && list.etag != "":
			refused = *list
		case isStatus(err, http.StatusBadRequest, http.StatusNotFound) && !pruned:
			// A registry that checks the targets of an index refuses every change of a list with deleted targets.
			pruned = true
			deleted, perr := p.deletedTargets(list)
			if perr != nil || len(deleted) == 0 {
				return err
			}
			original := change
			change = func(l *referrersList) bool {
				n := len(l.entries)
				l.entries = slices.DeleteFunc(l.entries, func(e listEntry) bool { return deleted[e.Digest] })
				return original(l) || len(l.entries) != n
			}
		case err != nil:
			return err
		}
	}
	return classf(errdefs.ErrAborted, "other clients keep changing the list of referrers: try again")
}

// deletedTargets returns the digests in a list that the registry no longer has.
func (p *push) deletedTargets(l *referrersList) (map[digest.Digest]bool, error) {
	deleted := map[digest.Digest]bool{}
	for _, e := range l.entries {
		if e.Digest.Validate() != nil {
			deleted[e.Digest] = true
			continue
		}
		there, err := p.hasManifest(object{digest: e.Digest})
		if err != nil {
			return nil, err
		}
		if !there {
			deleted[e.Digest] = true
		}
	}
	return deleted, nil
}

// lockReferrers keeps other processes of this user from changing the list under a tag, until unlock is called. Without
// a shared directory it does nothing. Unavailable if another process holds the lock for too long.
func (p *push) lockReferrers(tag object) (unlock func(), err error) {
	c := p.client
	if c.shared == "" {
		return func() {}, nil
	}
	ctx, cancel := context.WithTimeout(p.ctx, listPatience)
	defer cancel()
	for {
		f, err := sharedFile(c.shared, "referrers", os.O_RDWR|os.O_CREATE, c.currentScheme(), c.host, c.path, p.locator.Name, tag.tag)
		if err != nil {
			return func() {}, nil
		}
		if err := disk.LockContext(ctx, f, unix.LOCK_EX); err != nil {
			if cerr := context.Cause(p.ctx); cerr != nil {
				return nil, cerr
			}
			return nil, classf(errdefs.ErrUnavailable, "another process is changing the list of referrers")
		}
		if disk.Names(f.Name(), f) {
			now := time.Now() // shows sweepShared that the file is in use
			_ = os.Chtimes(f.Name(), now, now)
			return func() { disk.Release(f) }, nil
		}
		disk.Release(f) // swept: try again
	}
}
