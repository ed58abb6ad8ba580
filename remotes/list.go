package remotes

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"net/url"
	"strings"

	"distkit/errclass"
	"distkit/refname"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Bounds for lists that come in pages, which a registry could continue forever.
const (
	maxListed = 1 << 20
	maxPages  = 10000
)

// pages yields the pages of a list. Each is read completely, and bounded like a manifest.
func (c *client) pages(ctx context.Context, req request, t *tries) iter.Seq2[page, error] {
	return func(yield func(page, error) bool) {
		for range maxPages {
			p, err := c.page(ctx, req, t)
			if !yield(p, err) || err != nil || p.next == nil {
				return
			}
			req.url = p.next
			t = c.newTries(maxTries)
		}
		yield(page{}, classf(errdefs.ErrDataLoss, "the list has more than %d pages", maxPages))
	}
}

type page struct {
	content []byte
	header  http.Header
	next    *url.URL
}

func (c *client) page(ctx context.Context, req request, t *tries) (p page, err error) {
	err = c.retry(ctx, t, func() error {
		resp, b, err := c.readAll(ctx, req)
		if err != nil {
			return err
		}
		next, err := nextPage(resp)
		p = page{b, resp.Header, next}
		return err
	})
	return p, err
}

// nextPage returns the address of the next page of a list, or nil after the last one.
func nextPage(resp *http.Response) (*url.URL, error) {
	target, ok, err := nextLink(resp.Header.Values("Link"))
	if err != nil || !ok {
		return nil, err
	}
	current := resp.Request.URL
	u, err := current.Parse(target)
	if err != nil {
		return nil, classf(errdefs.ErrDataLoss, "malformed address of the list's next page: %q", printable(target))
	}
	// A registry behind a proxy knows its path, but not always its own name.
	u.Scheme, u.Host, u.User = current.Scheme, current.Host, nil
	if u.String() == current.String() {
		return nil, errCircles()
	}
	return u, nil
}

// Tags lists the tags of the repository, in the registry's order.
func (r *Registry) Tags(ctx context.Context) iter.Seq2[string, error] {
	return r.names(ctx, func(c *client) request {
		return r.request(c, http.MethodGet, "tags", "list")
	}, tagNames)
}

// names lists names that come in pages, from the first host that can list them.
func (r *Registry) names(ctx context.Context, request func(*client) request, kind nameList) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		listed := 0
		err := r.firstHost(ctx, canResolve, func(c *client, t *tries) error {
			err := c.names(ctx, t, request(c), kind, func(name string) error {
				if listed++; listed > maxListed {
					return classf(errdefs.ErrDataLoss, "the list has more than %d", maxListed)
				}
				if !yield(name, nil) {
					return errStopped
				}
				return nil
			})
			if err != nil && listed > 0 {
				return finalError{err}
			}
			return err
		})
		if err != nil && err != errStopped {
			yield("", fmt.Errorf("list %s of %s: %w", kind.what, strings.TrimSuffix(r.locator.String(), "/"), err))
		}
	}
}

// errStopped ends a list when the caller wants no more.
var errStopped = errors.New("stopped")

// nameList is a kind of list.
type nameList struct {
	what  string // also the name of the JSON member
	valid func(string) bool
}

var (
	tagNames        = nameList{"tags", refname.IsTag}
	repositoryNames = nameList{"repositories", refname.IsRepository}
)

// names calls f with each name of a list. Names that are invalid, and so could not be asked for, are left out; the user
// is notified of the first one.
func (c *client) names(ctx context.Context, t *tries, req request, kind nameList, f func(string) error) error {
	if req.query == nil {
		req.query = url.Values{}
	}
	req.query.Set("n", "1000")
	last, bad := "", ""
	for p, err := range c.pages(ctx, req, t) {
		if err != nil {
			return err
		}
		var members map[string]json.RawMessage
		var list []string
		err := decode(p.content, &members)
		if b := members[kind.what]; err == nil && b != nil {
			err = json.Unmarshal(b, &list)
		}
		if err != nil {
			return classf(errdefs.ErrDataLoss, "%s sent something else than a list of %s: %s", c.host, kind.what, printable(err.Error()))
		}
		if n := len(list); p.next != nil && (n == 0 || list[n-1] == last) {
			return errCircles()
		} else if n > 0 {
			last = list[n-1]
		}
		for _, name := range list {
			if !kind.valid(name) {
				if bad == "" && c.options.Notify != nil {
					c.options.Notify(fmt.Sprintf("%s lists invalid %s, such as %q: left out", c.host, kind.what, printable(name)))
				}
				bad = cmp.Or(bad, name, "an empty one")
				continue
			}
			if err := f(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// Repositories lists the repositories of a registry, in the registry's order.
func Repositories(ctx context.Context, host string, o Options) iter.Seq2[string, error] {
	return func(yield func(string, error) bool) {
		l, config, err := readHost(host, o)
		if err != nil {
			yield("", err)
			return
		}
		for name, err := range openRegistry(l, o, config.endpoints).repositories(ctx) {
			if !yield(name, err) {
				return
			}
		}
	}
}

func (r *Registry) repositories(ctx context.Context) iter.Seq2[string, error] {
	return r.names(ctx, func(c *client) request {
		return request{method: http.MethodGet, path: "/_catalog", query: r.query(c), header: http.Header{}, scopes: []string{auth.ScopeRegistryCatalog}}
	}, repositoryNames)
}

func errCircles() error {
	return classf(errdefs.ErrDataLoss, "the list goes in circles")
}

// Delete deletes a tag, or a manifest and all its tags. If the registry can't delete a tag alone, Delete moves the tag
// to a new empty index, and deletes that.
func (r *Registry) Delete(ctx context.Context, id string) error {
	o, err := parseObject(id)
	if err != nil {
		return err
	}
	p, err := r.newPush(ctx, o, hints{size: -1})
	if err == nil {
		err = p.delete()
	}
	if err != nil {
		return fmt.Errorf("delete %s: %w", o.join(r.locator.String()), err)
	}
	return nil
}

func (p *push) delete() error {
	subject, err := p.subject()
	if err != nil {
		return err
	}
	err = p.deleteManifest(p.object)
	switch {
	case err == nil && subject != "":
		if err := p.unlinkReferrer(subject, p.object.digest); err != nil {
			return fmt.Errorf("deleted, but not removed from the referrers of %s: %w", subject, err)
		}
		return nil
	case err == nil || !isStatus(err, http.StatusMethodNotAllowed, http.StatusBadRequest, http.StatusNotImplemented):
		return err
	case p.object.tag == "":
		return errclass.As(err, errdefs.ErrNotImplemented)
	}
	// Delete nothing but the index that is created here.
	if _, err := p.resolve(p.ctx, p.client, p.tries, p.object); err != nil {
		return err
	}
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}, Annotations: map[string]string{"distkit.untag": rand.Text()}}
	index.SchemaVersion = 2
	b, merr := json.Marshal(index)
	if merr != nil {
		return merr
	}
	dummy := object{digest: digest.FromBytes(b)}
	desc := ocispec.Descriptor{MediaType: index.MediaType, Digest: dummy.digest, Size: int64(len(b))}
	if _, perr := p.putManifest(dummy, desc, b, ""); perr != nil {
		return classf(errdefs.ErrNotImplemented, "the registry deletes no tags (%w): delete the digest", err)
	}
	// Check that it can be deleted before the tag is moved to it.
	if err := p.deleteManifest(dummy); err != nil {
		return classf(errdefs.ErrNotImplemented, "the registry deletes neither tags nor manifests: %w", err)
	}
	if _, err := p.putManifest(p.object, desc, b, ""); err != nil {
		return err
	}
	return p.deleteManifest(dummy)
}

// subject returns the subject of the manifest to delete. A registry without the referrers API lists the manifest under
// the subject's tag, from which the client must remove it (OCI distribution specification, "Deleting Manifests").
func (p *push) subject() (digest.Digest, error) {
	if p.object.digest == "" {
		return "", nil // deleting a tag keeps the manifest
	}
	m, err := p.Registry.manifest(p.ctx, p.client, p.tries, p.object, accept(""))
	if err != nil {
		if errdefs.IsNotFound(err) || isTemporary(err) || p.ctx.Err() != nil {
			return "", err
		}
		return "", nil // a manifest that can't be read can be deleted
	}
	var head referrer
	if decode(m.content, &head) != nil || head.Subject == nil || head.Subject.Digest.Validate() != nil {
		return "", nil
	}
	return head.Subject.Digest, nil
}

func (p *push) deleteManifest(o object) error {
	req := p.request(http.MethodDelete, "manifests", o.String())
	req.scopes = append(req.scopes, auth.ScopeRepository(p.locator.Name, auth.ActionDelete))
	wasLost := false
	return p.client.retry(p.ctx, p.tries, func() error {
		resp, err := p.client.once(p.ctx, req)
		switch {
		case err == nil:
			resp.Body.Close()
		case wasLost && errdefs.IsNotFound(err):
			return nil // done by an earlier try whose reply was lost
		}
		wasLost = err != nil
		return err
	})
}
