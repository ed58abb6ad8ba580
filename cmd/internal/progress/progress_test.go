package progress

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestNames(t *testing.T) {
	d := ocispec.Descriptor{Digest: digest.FromString("")}
	for mediaType, want := range map[string]string{
		ocispec.MediaTypeImageIndex:                                 "index-sha256:e3b0c44298fc",
		"application/vnd.docker.distribution.manifest.list.v2+json": "index-sha256:e3b0c44298fc",
		ocispec.MediaTypeImageManifest:                              "manifest-sha256:e3b0c44298fc",
		"application/vnd.docker.distribution.manifest.v2+json":      "manifest-sha256:e3b0c44298fc",
		ocispec.MediaTypeImageConfig:                                "config-sha256:e3b0c44298fc",
		"application/vnd.docker.container.image.v1+json":            "config-sha256:e3b0c44298fc",
		ocispec.MediaTypeImageLayerZstd:                             "layer-sha256:e3b0c44298fc",
		"application/vnd.docker.image.rootfs.diff.tar.gzip":         "layer-sha256:e3b0c44298fc",
		"": "blob-sha256:e3b0c44298fc",
	} {
		d.MediaType = mediaType
		if got := Name(d); got != want {
			t.Errorf("%s: %s, not %s", mediaType, got, want)
		}
	}
}

func TestFramesFitTheTerminal(t *testing.T) {
	var objects []*Object
	for i := range 30 {
		o := &Object{Name: fmt.Sprintf("layer-sha256:%012d", i), Size: 1 << 40, State: State(i % 4), Offset: int64(i) << 35}
		if o.State >= Exists {
			o.Offset = o.Size
		}
		objects = append(objects, o)
	}
	objects[0].Size, objects[0].Offset = 0, 12 // a size that isn't known
	for _, width := range []int{0, 1, 20, 40, 60, 79, 200} {
		for _, height := range []int{0, 1, 3, 4, 10, 24, 100} {
			d := &Display{begin: time.Now().Add(-time.Minute)}
			lines := d.frame(objects, width, height, time.Now(), height == 4)
			if len(lines) > max(height, 3) {
				t.Errorf("%d lines for a height of %d", len(lines), height)
			}
			for _, l := range lines {
				if len(l) > width {
					t.Errorf("%q is wider than %d", l, width)
				}
			}
			if width == 200 && height == 10 && !strings.Contains(lines[0], "moving") {
				t.Errorf("what moves is not shown first: %q", lines)
			}
		}
	}
}

func TestRateIsOfThisRun(t *testing.T) {
	begin := time.Now()
	d := &Display{begin: begin}
	o := &Object{Size: 100 << 20, First: 50 << 20, Offset: 50 << 20, State: Moving}
	d.summary([]*Object{o}, begin, false)
	o.Offset = 60 << 20
	if got := d.summary([]*Object{o}, begin.Add(time.Second), false); !strings.Contains(got, "60 MiB of 100 MiB") || !strings.Contains(got, "(10 MiB/s)") {
		t.Error(got)
	}
	if got := d.summary([]*Object{o}, begin.Add(100*time.Second), false); !strings.Contains(got, "(0 B/s)") && !strings.Contains(got, "(103 KiB/s)") {
		t.Error(got)
	}
	o.Offset = 100 << 20
	if got := d.summary([]*Object{o}, begin.Add(100*time.Second), true); !strings.Contains(got, "(512 KiB/s)") {
		t.Error(got)
	}
}
