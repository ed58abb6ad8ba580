package image

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestValidate(t *testing.T) {
	const (
		d        = `"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"`
		blob     = `{"mediaType":"application/octet-stream","digest":` + d + `,"size":2}`
		manifest = `{"schemaVersion":2,"config":` + blob + `,"layers":[` + blob + `]}`
		docker   = `{"schemaVersion":2,"mediaType":"` + dockerManifest + `","config":` + blob + `,"layers":[]}`
		index    = `{"schemaVersion":2,"manifests":[` + blob + `]}`
		config   = `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":[` + d + `]}}`
	)
	for _, good := range []string{manifest, docker, index, config, " " + manifest + "\n"} {
		if err := Validate([]byte(good)); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{
		"", "x", "[]", "{}", "null", `"x"`,
		manifest + "}",
		manifest[1:],
		strings.Replace(manifest, "2", "1", 1),
		strings.Replace(manifest, `"schemaVersion":2,`, "", 1),
		strings.Replace(manifest, "sha256:44", "sha256:zz", 1),
		strings.Replace(manifest, `"size":2`, `"size":-2`, 1),
		strings.Replace(manifest, `"layers":[`, `"annotations":{"a":1},"layers":[`, 1),
		strings.Replace(index, "sha256:44", "sha256:4", 1),
		strings.Replace(config, "linux", "", 1),
		strings.Replace(config, `"layers"`, `"tar"`, 1),
		strings.Replace(config, "sha256:44", "sha256:4", 1),
		strings.Replace(config, `"linux"`, `1`, 1),
	} {
		if err := Validate([]byte(bad)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", bad, err)
		}
	}
}
