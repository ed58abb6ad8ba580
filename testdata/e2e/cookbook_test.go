//go:build e2e

package e2e

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"path/filepath"
	"testing"

	"distkit/testdata/fixture"
)

// TestCookbook runs docs/cookbook.md before Debian's registry, behind TLS of a private authority and passwords, and before the newest one of
// distribution; docker.io has an image of Debian's packages.
func TestCookbook(t *testing.T) {
	fixture.Need(t, "distribution,rclone,busybox,ssh,runc")
	p := here(t)
	addr, a := private(t, false)
	other, held, err := serve("distribution", filepath.Join(t.TempDir(), "registry"), "", "", http.DefaultClient)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { held.Close() })
	ssh, err := fixture.Machine(filepath.Dir(p.dir))
	if err := errors.Join(err,
		p.Host("registry.example.com", fmt.Sprintf("server = 'https://%s'\nca = '%s/ca.pem'\n", addr, a.dir)),
		p.Host("prod.example.com", fmt.Sprintf("server = 'http://%s'\n", other))); err != nil {
		t.Fatal(err)
	}
	p.set("DIST_SSH="+ssh, "REGISTRY_USER=me", "REGISTRY_PASSWORD=word")
	fixture.Cookbook(t, func(script string) (string, error) {
		var out bytes.Buffer
		c := p.cmd(script)
		c.Stdout, c.Stderr = &out, &out
		err := fixture.Run(c)
		return out.String(), err
	})
}
