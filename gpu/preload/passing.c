/* Messages with descriptors, over SEQPACKET sockets. */

#include "qt.h"

#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

bool qt_send(int s, void *data, size_t size, const int *fds, unsigned count)
{
	char room[CMSG_SPACE(sizeof(int) * QT_BATCH)];
	struct iovec part = {data, size};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
	if (count) {
		message.msg_control = room;
		message.msg_controllen = CMSG_SPACE(sizeof(int) * count);
		struct cmsghdr *header = CMSG_FIRSTHDR(&message);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int) * count);
		memcpy(CMSG_DATA(header), fds, sizeof(int) * count);
	}
	return sendmsg(s, &message, MSG_NOSIGNAL) == (ssize_t)size;
}

ssize_t qt_receive(int s, struct iovec *parts, size_t parts_count, int *fds, unsigned *count)
{
	char room[CMSG_SPACE(sizeof(int) * QT_BATCH)];
	struct msghdr header = {
		.msg_iov = parts, .msg_iovlen = parts_count, .msg_control = room, .msg_controllen = sizeof room};
	*count = 0;
	ssize_t size = recvmsg(s, &header, MSG_CMSG_CLOEXEC);
	struct cmsghdr *rights = size > 0 ? CMSG_FIRSTHDR(&header) : NULL;
	if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS) {
		*count = (unsigned)((rights->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(rights), *count * sizeof(int));
	}
	return size;
}

void qt_close_all(int *fds, unsigned *count)
{
	for (unsigned i = 0; i < *count; i++)
		close(fds[i]);
	*count = 0;
}
