/* Shared by C and assembly. */
#ifndef QT_SIZES_H
#define QT_SIZES_H

#define QT_THUNKS 1536      /* functions of the driver: those of functions.h, and versions that only cuGetProcAddress knows */
#define QT_THUNK_SIZE 16    /* octets */

#endif
