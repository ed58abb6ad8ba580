package layout

import (
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

func TestReferrerTags(t *testing.T) {
	t.Parallel()
	subject := digest.FromString("x")
	tags := ReferrerTags(subject, "")
	if len(tags) != 3 || len(ReferrerTags(subject, tags[1].ArtifactType)) != 1 || len(ReferrerTags(subject, "a/b")) != 0 {
		t.Errorf("%+v", tags)
	}
	for _, want := range tags {
		for _, name := range []string{want.Tag, "localhost:5000/x:" + want.Tag} {
			if got, of, ok := ParseReferrerTag(name); !ok || got != want || of != subject {
				t.Errorf("%s: %+v, %s, %v", name, got, of, ok)
			}
		}
	}
	if tags := ReferrerTags(digest.Digest("sha512:"+strings.Repeat("0", 128)), ""); tags != nil {
		t.Errorf("a digest that is too long for a tag: %+v", tags)
	}
	hex := subject.Encoded()
	for _, name := range []string{"", "sha256-", ".sig", "sha256-.sig", "sha256-" + hex, "sha256-" + hex + ".other", "sha256-" + hex[1:] + ".sig",
		"sha256-" + strings.ToUpper(hex) + ".sig", "sha256-" + hex + ".sig.sig", "x/sha256-" + hex + ".sig", "sha512-" + hex + ".sig"} {
		if _, of, ok := ParseReferrerTag(name); ok {
			t.Errorf("%q attaches to %s", name, of)
		}
	}
}
