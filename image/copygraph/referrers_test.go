package copygraph_test

import (
	"context"
	"fmt"
	"slices"
	"testing"

	"distkit/content"
	"distkit/disk/layout"
	"distkit/image"
	"distkit/image/copygraph"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// attach stores an artifact that refers to a subject, and lists it in the index of the store.
func attach(t *testing.T, s *content.Store, subject v1.Descriptor, artifactType, text string) v1.Descriptor {
	t.Helper()
	m := v1.Manifest{MediaType: v1.MediaTypeImageManifest, ArtifactType: artifactType, Subject: &subject}
	m.SchemaVersion = 2
	m.Config = put(t, s, v1.MediaTypeEmptyJSON, []byte("{}"))
	m.Layers = []v1.Descriptor{put(t, s, "text/plain", []byte(text))}
	d := putJSON(t, s, v1.MediaTypeImageManifest, m)
	names, err := image.OpenNames(s, image.DefaultNamespace)
	if err == nil {
		err = names.AddReferrers(t.Context(), []layout.Referrer{{Descriptor: d, Subject: subject.Digest}})
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestReferrers(t *testing.T) {
	t.Parallel()
	from := open(t)
	amd, arm := manifest(t, from, "amd64", "a"), manifest(t, from, "arm64", "b")
	root := index(t, from, on(amd, "amd64"), on(arm, "arm64"))
	signature := attach(t, from, root, "a/signature", "signature")
	sbom := attach(t, from, amd, "a/sbom", "sbom")
	signed := attach(t, from, sbom, "a/signature", "signature of the sbom")
	other := attach(t, from, arm, "a/sbom", "other sbom")
	linux, err := image.ParsePlatform("linux/amd64")
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		types     []string
		platforms []*image.Platform
		want      []v1.Descriptor
	}{
		"all":             {nil, nil, []v1.Descriptor{signature, sbom, signed, other}},
		"of one type":     {[]string{"a/sbom"}, nil, []v1.Descriptor{sbom, other}},
		"of two types":    {[]string{"a/sbom", "a/signature"}, nil, []v1.Descriptor{signature, sbom, signed, other}},
		"of one platform": {nil, []*image.Platform{linux}, []v1.Descriptor{signature, sbom, signed}},
		"of none":         {[]string{"a/none"}, nil, nil},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			to := newRemote(t)
			if c.platforms != nil {
				to.blobs[arm.Digest] = nil // its index refers to it
			}
			g := &copygraph.Copy{Documents: from, To: to, Tags: []string{"v1"}, Platforms: c.platforms, Referrers: copygraph.ReferrersOf(from, image.DefaultNamespace), ArtifactTypes: c.types}
			got, err := records(t, g, root)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range []v1.Descriptor{signature, sbom, signed, other} {
				outcome, copied := got[d.Digest]
				if want := slices.ContainsFunc(c.want, func(w v1.Descriptor) bool { return w.Digest == d.Digest }); copied != want || want && outcome != copygraph.Stored {
					t.Errorf("%s: %q", d.Digest, outcome)
				}
			}
			if n := len(g.Referring()); n != len(c.want) {
				t.Errorf("%d referrers, not %d", n, len(c.want))
			}
			place := func(d v1.Descriptor) int { return slices.Index(to.puts, d.Digest) }
			for _, pair := range [][2]v1.Descriptor{{root, signature}, {amd, sbom}, {sbom, signed}, {arm, other}} {
				if at := place(pair[1]); at >= 0 && at < place(pair[0]) {
					t.Errorf("%s comes before its subject", pair[1].Digest)
				}
			}
			// On a repeated copy the target gets the referrers again, in case no list has them.
			before := len(to.puts)
			got, err = records(t, g, root)
			if err != nil || len(to.puts) != before+len(c.want) || got[root.Digest] != copygraph.Exists {
				t.Errorf("again: %v, %d were put, %v", got, len(to.puts)-before, err)
			}
		})
	}
	// A store as the target is asked for referrers like for any other object.
	to := open(t)
	g := &copygraph.Copy{Documents: to, From: copygraph.FromStore(from), To: copygraph.IntoStore(to), Referrers: copygraph.ReferrersOf(from, image.DefaultNamespace)}
	for _, want := range []copygraph.Outcome{copygraph.Stored, copygraph.Exists} {
		got, err := records(t, g, root)
		if err != nil || count(got, want) != len(got) || got[signed.Digest] != want {
			t.Errorf("%v, %v", got, err)
		}
	}
	whole(t, to, root)
	for _, d := range g.Referring() {
		whole(t, to, d.Descriptor)
	}
}

// A list that a command does not complete is read again from another process, from its beginning.
func TestReferrersOfACommand(t *testing.T) {
	t.Parallel()
	from := open(t)
	root := manifest(t, from, "amd64", "a")
	for i := range 3 {
		attach(t, from, root, "a/b", fmt.Sprint(i))
	}
	for what, c := range map[string]struct {
		setting string
		starts  int
	}{"all is well": {"CUT=0", 1}, "it is cut in the list": {"FAULTS=1 CUT=25000 EXIT=6", 2}} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			to, source := open(t), newServed(t, from, c.setting)
			command := copygraph.FromCommand(source.command, true)
			g := &copygraph.Copy{Documents: to, From: command, To: copygraph.IntoStore(to), Referrers: command.Referrers()}
			got, err := records(t, g, root)
			_ = command.Close()
			if err != nil || len(g.Referring()) != 3 || count(got, copygraph.Stored) != 3+3+4 {
				t.Errorf("%d referrers, %v, %v", len(g.Referring()), got, err)
			}
			if n := source.count(t); n != c.starts {
				t.Errorf("%d starts, not %d", n, c.starts)
			}
		})
	}
}

// A list of referrers may contain anything.
func TestHostileReferrers(t *testing.T) {
	t.Parallel()
	from := open(t)
	child := manifest(t, from, "amd64", "a")
	root := index(t, from, on(child, "amd64"))
	other := manifest(t, from, "arm64", "b")
	chain := []v1.Descriptor{root}
	for i := range image.MaxDepth + 1 {
		chain = append(chain, attach(t, from, chain[i], "a/b", fmt.Sprint(i)))
	}
	large := other
	large.Size = image.MaxDocument + 1
	one := func(subject, d v1.Descriptor) copygraph.ListReferrers {
		return func(_ context.Context, of digest.Digest, f func(v1.Descriptor) error) error {
			if of != subject.Digest {
				return nil
			}
			return f(d)
		}
	}
	for what, c := range map[string]struct {
		list   copygraph.ListReferrers
		failed func(error) bool
	}{
		"a child":            {one(root, child), errdefs.IsDataLoss},
		"the subject itself": {one(root, root), errdefs.IsDataLoss},
		"the parent":         {one(child, root), errdefs.IsDataLoss},
		"another image":      {one(child, other), errdefs.IsDataLoss},
		"another's":          {one(child, chain[1]), errdefs.IsDataLoss},
		"too large":          {one(root, large), errdefs.IsInvalidArgument},
		"absent":             {one(root, v1.Descriptor{MediaType: v1.MediaTypeImageManifest, Digest: digest.FromString("none"), Size: 4}), errdefs.IsNotFound},
		"too deep":           {copygraph.ReferrersOf(from, image.DefaultNamespace), errdefs.IsInvalidArgument},
		"without end": {func(_ context.Context, _ digest.Digest, f func(v1.Descriptor) error) error {
			for {
				if err := f(chain[1]); err != nil {
					return err
				}
			}
		}, errdefs.IsInvalidArgument},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			to := open(t)
			for _, g := range []*copygraph.Copy{
				{Documents: to, From: copygraph.FromStore(from), To: copygraph.IntoStore(to), Referrers: c.list},
				{Documents: from, To: newRemote(t), Referrers: c.list},
			} {
				if _, err := records(t, g, root); err == nil || !c.failed(err) {
					t.Error(err)
				}
			}
		})
	}
}
