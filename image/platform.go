package image

import (
	"distkit/errclass"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// Platform selects manifests of an index, and orders them by how well they match.
type Platform struct {
	name string
	platforms.MatchComparer
	// strict is set if the user asked for the platform: then a manifest that is in no index must match too.
	strict bool
}

// ParsePlatform parses containerd's syntax, os/arch[/variant] or a part of it. "local" means Linux on this machine's
// architecture, since images are for Linux, whatever system this is. "" selects the same from an index, but accepts any
// manifest that is in no index. InvalidArgument if s is malformed.
func ParsePlatform(s string) (*Platform, error) {
	var p v1.Platform
	if s == "" || s == "local" {
		p = platforms.DefaultSpec()
		p.OS = "linux"
	} else {
		var err error
		if p, err = platforms.Parse(s); err != nil {
			return nil, errclass.Errorf(errdefs.ErrInvalidArgument, "platform %.80q is neither os/arch[/variant] nor local", s)
		}
	}
	return &Platform{platforms.FormatAll(p), platforms.Only(p), s != ""}, nil
}

func (p *Platform) String() string { return p.name }
