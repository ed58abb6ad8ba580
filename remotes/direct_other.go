//go:build !linux

package remotes

import (
	"context"
	"errors"
	"net"
	"os"
)

const pipeRead = readBuffer

func splice(*net.TCPConn, *os.File, int) (int, error) { return 0, errors.ErrUnsupported }

func waitWritable(context.Context, *os.File) {}

func widen(*os.File) {}
