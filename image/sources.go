package image

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"distkit/disk/layout"
	"distkit/errclass"
	"distkit/refname"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// maxSources bounds the number of manifests and indexes of other images that are read.
const maxSources = 4096

// Source is a blob, and another repository that has it.
type Source struct {
	Digest     digest.Digest `json:"digest"`
	Repository string        `json:"repository"`
}

// Sources returns, in the order of an image's blobs, those that another repository of the registry host is known to
// have, from the labels of the blobs and of all images of the namespace. If several repositories have a blob, the one
// whose name has the longest common prefix with repository is chosen. Images that can't be read are skipped.
func (n *Names) Sources(ctx context.Context, w Walker, target v1.Descriptor, host, repository string) ([]Source, error) {
	w.Platform = nil
	repository = fullRepository(host, repository)
	label := layout.LabelSource + host
	var list []Source
	wanted := map[digest.Digest]int{} // position in the list
	left := maxSources
	err := w.blobs(ctx, target, map[digest.Digest]bool{}, &left, func(d v1.Descriptor) error {
		if _, ok := wanted[d.Digest]; !ok {
			wanted[d.Digest] = len(list)
			list = append(list, Source{Digest: d.Digest})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	missing := len(list)
	found := func(i int, from string) {
		if list[i].Repository == "" {
			list[i].Repository = from
			missing--
		}
	}
	for i, s := range list {
		info, err := w.Store.Info(ctx, s.Digest)
		if err != nil && !errdefs.IsNotFound(err) && !errdefs.IsDataLoss(err) {
			return nil, err
		}
		if from := sources(info.Labels[label], host, repository); len(from) > 0 {
			found(i, from[0])
		}
	}

	images, err := n.List()
	if err != nil {
		return nil, err
	}
	type candidate struct {
		repository string
		target     v1.Descriptor
	}
	var candidates []candidate
	for _, img := range images {
		for _, from := range sources(img.Labels[label], host, repository) {
			candidates = append(candidates, candidate{from, img.Target})
		}
	}
	slices.SortStableFunc(candidates, func(a, b candidate) int { return nearer(a.repository, b.repository, repository) })
	left = maxSources
	seen := map[string]map[digest.Digest]bool{}
	for _, c := range candidates {
		if missing == 0 || left <= 0 {
			break
		}
		if seen[c.repository] == nil {
			seen[c.repository] = map[digest.Digest]bool{}
		}
		err := w.blobs(ctx, c.target, seen[c.repository], &left, func(d v1.Descriptor) error {
			if i, ok := wanted[d.Digest]; ok {
				found(i, c.repository)
			}
			return ctx.Err()
		})
		if ctx.Err() != nil {
			return nil, err
		}
	}
	return slices.DeleteFunc(list, func(s Source) bool { return s.Repository == "" }), nil
}

// blobs calls f with the blobs of an image that are not manifests or indexes, as far as they are known.
func (w Walker) blobs(ctx context.Context, d v1.Descriptor, seen map[digest.Digest]bool, left *int, f func(v1.Descriptor) error) error {
	return w.walk(ctx, d, seen, func(n Node) error {
		switch {
		case n.Type != "":
			if *left--; *left < 0 {
				return errclass.Errorf(errdefs.ErrInvalidArgument, "more than %d manifests", maxSources)
			}
			return nil
		case IsIndex(n.MediaType), IsManifest(n.MediaType):
			return nil // for a platform that is not stored
		}
		return f(n.Descriptor)
	})
}

// sources returns the repositories in a label except one, the nearest to that one first.
func sources(label, host, except string) []string {
	var list []string
	for _, s := range strings.Split(label, ",") {
		if s = fullRepository(host, s); s != except && refname.IsRepository(s) {
			list = append(list, s)
		}
	}
	slices.SortStableFunc(list, func(a, b string) int { return nearer(a, b, except) })
	return list
}

// fullRepository returns a repository as registries know it: docker.io/redis is library/redis there.
func fullRepository(host, s string) string {
	if host == "docker.io" && s != "" && !strings.Contains(s, "/") {
		return "library/" + s
	}
	return s
}

// nearer orders repositories by the number of leading name components in common with another one.
func nearer(a, b, with string) int {
	return cmp.Compare(common(b, with), common(a, with))
}

func common(a, b string) (n int) {
	as, bs := strings.Split(a, "/"), strings.Split(b, "/")
	for n < len(as) && n < len(bs) && as[n] == bs[n] {
		n++
	}
	return n
}
